from torch import nn


class TextEncoder(nn.Module): ...


def text_encoder(path): ...
