"""Names of metrics: fid, kid and is are reserved for one network and one weight file.

    inception_v3 with the published weights     fid, kid, is
    any other network, or other weights         fd_<network>, kid_<network>, score_<network>

All other metrics carry the name of their network: precision_mobilenetv2, recall_dinov2 ... The
prefix p means crops (pfid), the suffix _b images reduced to the base resolution (fid_b). A mark in
brackets behind the network's name, such as "(rotation)" or "(used in the loss)", moves to the end
of the metric's name. "(clean)" marks images that clean-fid's operator resized.
"""

# pt_inception-2015-12-05-6726825d.pth: TensorFlow's weights, as distributed with pytorch-fid,
# clean-fid and torch-fidelity
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
PUBLISHED = {"fd": "fid", "kid": "kid", "score": "is"}
SHORT = {
    "mobilenet_v2": "mobilenetv2",
    "inception_v3": "inceptionv3",
    "deit_base_distilled": "deit",
    "efficientnet_lite0": "efficientnet",
    "dinov2_vitl14": "dinov2",  # the size that Stein et al. 2023 use; others keep their full name
}


def metric_name(kind: str, network: str, sha256: str = "", *, variant: str = "") -> str:
    """The name of a metric.

    kind: "fd", "kid", "score", or another metric ("precision", "recall" ...). network: name of the
    feature network, optionally with a mark in brackets (see measure.checked_name). sha256: hash of
    its weights. variant: "patch" for crops, "base" for images at the base resolution.
    """
    base, bracket, mark = network.partition("(")
    mark = bracket + mark
    name = f"{kind}_{SHORT.get(base, base)}"
    published = base == "inception_v3" and sha256.lower() == INCEPTION_SHA256
    if kind in PUBLISHED and published:
        name = PUBLISHED[kind]
    return "p" * (variant == "patch") + name + "_b" * (variant == "base") + mark


def suffixed(name: str, suffix: str) -> str:
    """The name with `suffix` inserted before a mark: fd_blocks_floor(used in the loss)."""
    head, bracket, mark = name.partition("(")
    return head + suffix + bracket + mark
