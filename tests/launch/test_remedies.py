"""What an error text tells the user to type: a command accepts it, in the one form of the README.

Every string of the program is read, except docstrings. A flag that it names is defined by a
command. A field after the colon, where the remedy stands, is written --config.FIELD=VALUE; a stage
has the field, and the value is valid. The words of --arg=NAME=VALUE are those of a config file.
"""

import ast
import importlib
import pathlib
import re

import pytest
from absl import flags

from configs import common, fields

ROOT = pathlib.Path(__file__).resolve().parents[2]
COMMANDS = (
    "train",
    "import",
    "export",
    "sample",
    "edit",
    "recaption",
    "evaluate",
    "pipeline",
    "sweep",
    "bench.__main__",
)
SECTIONS = {name.partition(".")[0] for name in fields.every_field() if "." in name}
# Fields that are no common English words; others are only recognised behind "config.".
BARE = [name for name in fields.every_field() if "_" in name and "." not in name]
HOLE = "\0"  # stands for a value that the program puts into a text
FLAG = re.compile(r"(?<![\w-])--(config\.)?([a-zA-Z][\w.]*\w|\w)(?:=(\S*[^\s.,:;)'\"]))?")
PIP = re.compile(r"pip install( --[\w-]+)+")  # with flags of another program
FIELD = re.compile(
    rf"(?<![\w./-])((?:config\.)?(?:(?:{'|'.join(sorted(SECTIONS))})(?:\.\w+)+|{'|'.join(BARE)})"
    r"|config\.\w+)\b(?!/)"
)
WORD = re.compile(rf"(?<![\w.=,-])(?:{'|'.join(common.ARGUMENTS)})=[\w\0]")
ADVICE = re.compile(r"(set|lower|raise|give|choose|name|use) ")


def texts(code: str) -> list[tuple[int, str]]:
    """[(line, text)] of the strings in a program that are no docstrings; holes for values."""
    tree, inner = ast.parse(code), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            inner.add(node.value)
        elif isinstance(node, ast.JoinedStr):
            inner.update(node.values)
    found = []
    for node in ast.walk(tree):
        if node in inner:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append((node.lineno, node.value))
        elif isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else HOLE for part in node.values]
            found.append((node.lineno, "".join(parts)))
    return [(line, text) for line, text in found if " " in text]


def known_flags() -> set[str]:
    """The names of the flags of all commands."""
    names = {"help"}
    for command in COMMANDS:
        module = importlib.import_module(f"launch.{command}")
        before = set(flags.FLAGS)
        (getattr(module, "define", None) or module.define_flags)()
        new = set(flags.FLAGS) - before
        names |= new | {f"no{name}" for name in new if flags.FLAGS[name].boolean}
        for name in new:
            delattr(flags.FLAGS, name)
    return names


def mistakes(text: str, defined: set[str]) -> list[str]:
    """What a text tells the user to type and no command accepts."""
    wrong, text = [], PIP.sub("", text)
    for config, name, value in FLAG.findall(text):
        if not config and name == "arg" and HOLE not in value:
            wrong += [f"{word} is no word of --arg" for word in unknown_words(value)]
        elif not config and name not in defined:
            wrong.append(f"no command has --{name}")
        elif config:
            wrong += field_mistakes(name, value)
    remedy = 0 if ADVICE.match(text) else text.find(": ") % (len(text) + 1)
    for match in FIELD.finditer(text):
        name = match[1].removeprefix("config.")
        place = ROOT / "cheapscale" / name.replace(".", "/")
        names = (place.with_suffix(".py"), place.parent.with_suffix(".py"))
        if any(path.is_file() for path in names) or name.endswith((".pkl", ".json", ".npz")):
            continue  # a Python name, or a file
        wrong += field_mistakes(name, "")
        if match.start() > remedy:
            wrong.append(f"write --config.{name}")
    wrong += [f"write --arg={word}" for word in WORD.findall(text[remedy:])]
    return wrong


def unknown_words(words: str) -> list[str]:
    try:
        common.parse(words)
    except ValueError as error:
        return [str(error)]
    return []


def field_mistakes(name: str, value: str) -> list[str]:
    """What is wrong with --config.`name`=`value`."""
    if name in ("FIELD", "") or name.partition(".")[0] == HOLE:
        return []
    name = name.replace(HOLE, "any")
    found = [field for stage in fields.STAGES if (field := common.find(name, stage))]
    if not found:
        return [f"no stage has the field {name}"]
    if not value or HOLE in value or value.isupper() or not value.isascii():
        return []
    try:
        why = fields.fault(common.typed(name, value, found[0].default), found[0])
    except ValueError as error:
        why = str(error)
    return [f"--config.{name}={value}: {why}"] if why else []


@pytest.mark.parametrize("room", ["cheapscale", "launch", "configs"])
def test_every_flag_and_field_in_a_text_can_be_typed(room):
    defined = known_flags()
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {mistake}: {text!r}"
        for path in sorted((ROOT / room).rglob("*.py"))
        for line, text in texts(path.read_text())
        for mistake in mistakes(text, defined)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "code, said",
    [
        ("raise ValueError(f'{x} is wrong: give --seeed=1')", "no command has --seeed"),
        ("raise ValueError(f'{x}: give --config.optm.lr=1')", "no stage has the field optm.lr"),
        ("raise ValueError(f'{x}: give ' f'--config.data.options.probes={y}')", "options.probes"),
        ("raise ValueError(f'{x}: give --config.distill.gan_loss=l2')", "not one of 'hinge'"),
        ("raise ValueError(f'{x}: give --config.optim.lr=-1')", "at least 0"),
        (
            "raise ValueError('no: set data.options.probe=False')",
            "write --config.data.options.prob",
        ),
        ("raise ValueError('no: raise total_steps')", "write --config.total_steps"),
        ("TEXT = 'lower data.resolution'", "write --config.data.resolution"),
        ("sys.exit('no: name another folder in config.latents')", "write --config.latents"),
        ("raise ValueError('no: use tune=full')", "write --arg=tune=f"),
        ("raise ValueError('no: give --arg=toon=full')", "'toon' is unknown"),
        ("raise ValueError('the field optim.rate is 3')", "no stage has the field optim.rate"),
    ],
)
def test_a_made_up_remedy_is_found(code, said):
    ((_, text),) = texts(code)
    (wrong,) = mistakes(text, known_flags())
    assert said in wrong


def test_a_right_remedy_passes():
    text = "x: give --config.data.options.where.a=1, --noema or --arg=tune=full,seed=1 (--num=3)."
    assert not mistakes(text, known_flags())
