"""What a number may be called: FID, KID and IS are earned by one network and one weight file.

    inception_v3 with the published weights     fid, kid, is
    any other network, or unknown weights       fd_<network>, kid_<network>, score_<network>

Everything else carries its network always: precision_mobilenetv2, recall_dinov2 ... Variants of
the distances come before and after: pfid (patches), fid_b (at the base resolution). A mark in
brackets behind a network's name, as "(rotation)" or "(used in the loss)", stays; images that were
resized in another way than the network's own have theirs, "(clean)" or "(tf1)".
"""

# pt_inception-2015-12-05-6726825d.pth: TensorFlow's weights as pytorch-fid, clean-fid and
# torch-fidelity ship them
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
PUBLISHED = {"fd": "fid", "kid": "kid", "score": "is"}
SHORT = {
    "mobilenet_v2": "mobilenetv2",
    "inception_v3": "inceptionv3",
    "deit_base_distilled": "deit",
    "efficientnet_lite0": "efficientnet",
    "dinov2_vitl14": "dinov2",  # the one of Stein et al. 2023; the smaller ones say their size
}
VARIANTS = ("", "patch", "base")


def metric_name(kind: str, network: str, sha256: str = "", *, variant: str = "") -> str:
    """The name of a number.

    Args:
        kind: "fd", "kid", "score", or any other metric ("precision", "recall" ...).
        network: name of the feature network, perhaps with a mark in brackets (quality.checked_name
            adds one); sha256: of its weights.
        variant: "patch" for random crops, "base" for images reduced to the base resolution.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}: choose one of {VARIANTS}")
    base, bracket, mark = network.partition("(")
    mark = bracket + mark
    name = f"{kind}_{SHORT.get(base, base)}"
    if kind in PUBLISHED and is_published(base, sha256):
        name = PUBLISHED[kind]
    return "p" * (variant == "patch") + name + "_b" * (variant == "base") + mark


def suffixed(name: str, suffix: str) -> str:
    """A name with a suffix ahead of its mark in brackets: fd_blocks_floor(used in the loss)."""
    head, bracket, mark = name.partition("(")
    return head + suffix + bracket + mark


def is_published(network: str, sha256: str) -> bool:
    """Whether these are the network and the weights that FID, KID and IS are defined by."""
    return network == "inception_v3" and sha256.lower() == INCEPTION_SHA256
