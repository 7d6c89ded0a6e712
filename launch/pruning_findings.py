"""What the cells of the step-adaptive study say about the paper's claims, claim by claim."""

from launch.paired import difference


def findings(config: dict, cells: dict) -> dict:
    """{claim: figures} of the cells {name: {"figures": ...}}; a claim whose cells are not there is
    left out."""
    held = {name.partition(" ")[2]: cell["figures"] for name, cell in cells.items()}
    found = {}
    for seed in config["seeds"]:
        for claim, rows in of_seed(held, f"seed {seed}: ").items():
            found[f"{claim}, seed {seed}"] = rows
    for name in ("memory", "jumps", "inversion", "seconds"):
        if name in held:
            found[name] = held[name]
    return found


def of_seed(held: dict, start: str) -> dict:
    """The arms of one seed, against the base trained longer (the headline) and the specialists."""
    rows = {n.removeprefix(start): row for n, row in held.items() if n.startswith(start)}
    found = {}
    controls = [name for name in ("base longer", "base longer at half the rate") if name in rows]
    if "specialists" in rows and controls:
        ours = rows["specialists"]
        found["specialists against the base"] = {
            "sampling FLOPs": ours["share"],
            "mean shares": ours["mean_shares"],
            "training, in steps of the base": ours["steps_of_base"],
            "parameters": ours["parameters"],
            **{f"fd minus {name}": difference(ours, rows[name])["fd"] for name in controls},
        }
    if "specialists" in rows and len(rows) > 1:
        found["arms against the specialists"] = {
            name: difference(row, rows["specialists"])
            | {"share": row["share"], "steps_of_base": row["steps_of_base"]}
            for name, row in rows.items()
            if name != "specialists"
        }
    if "full size" in rows and "base longer" in rows:
        found["loss of full-size specialists over the base's by group"] = [
            a / b for a, b in zip(rows["full size"]["losses"], rows["base longer"]["losses"])
        ]
    return found


def table(cells: dict) -> str:
    """The arms as text."""
    lines = [f"{'':44}{'fd':>20}{'share':>8}{'steps':>8}   loss by group"]
    for name, cell in cells.items():
        row = cell["figures"]
        if "fd" in row:
            fd = f"{row['fd'][0]:10.3f} ±{1.96 * row['fd'][1]:7.3f}"
            losses = " ".join(f"{loss:8.4f}" for loss in row["losses"])
            cost = f"{row['share']:8.3f}{row['steps_of_base']:8.0f}"
            lines.append(f"{name:44}{fd:>20}{cost}   {losses}")
    return "\n".join(lines)
