"""Inception's features, prepared as the original TensorFlow graph and torch-fidelity do.

For statistics made by the original scripts, such as guided-diffusion's. The network and its weights are those
of `inception`; FIDs by the two preparations differ in the second or third digit.
"""

from __future__ import annotations

from ddexport.validate.features._inception_network import prepare_tf1
from ddexport.validate.features.inception import InceptionFeatures


class InceptionTfFeatures(InceptionFeatures):
    """2048 features of images of any size; 1008 classes, where the weights have the classifier."""

    name = "inception_tf"
    prepare = staticmethod(prepare_tf1)


EXTRACTOR = InceptionTfFeatures
