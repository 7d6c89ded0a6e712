"""Metric names carry their network, and published names require the published weights."""

import pytest

from cheapscale.evaluation.naming import INCEPTION_SHA256, metric_name


@pytest.mark.parametrize(
    "kind, network, sha256, variant, name",
    [
        ("fd", "inception_v3", INCEPTION_SHA256, "", "fid"),
        ("kid", "inception_v3", INCEPTION_SHA256.upper(), "", "kid"),
        ("score", "inception_v3", INCEPTION_SHA256, "", "is"),
        ("fd", "inception_v3", INCEPTION_SHA256, "patch", "pfid"),
        ("kid", "inception_v3", INCEPTION_SHA256, "base", "kid_b"),
        ("precision", "inception_v3", INCEPTION_SHA256, "", "precision_inceptionv3"),
        ("fd", "inception_v3", "another", "", "fd_inceptionv3"),
        ("fd", "inception_v3", "", "", "fd_inceptionv3"),
        ("fd", "mobilenet_v2", INCEPTION_SHA256, "", "fd_mobilenetv2"),
        ("kid", "mobilenet_v2", "", "patch", "pkid_mobilenetv2"),
        ("fd", "resnet56", "", "", "fd_resnet56"),
        ("fd", "dinov2_vitl14", "", "", "fd_dinov2"),
        ("fd", "dinov2_vits14", "", "", "fd_dinov2_vits14"),
        ("fd", "classifier(rotation)", "", "base", "fd_classifier_b(rotation)"),
        ("fd", "inception_v3(used in the loss)", INCEPTION_SHA256, "", "fid(used in the loss)"),
    ],
)
def test_names(kind, network, sha256, variant, name):
    assert metric_name(kind, network, sha256, variant=variant) == name
