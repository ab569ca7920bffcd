"""The T5 encoder that turns tokens of a prompt into features, from a directory as on the Hugging Face Hub.

The module is transformers', but for two things: its weights are read as those of all other parts are, because
`from_pretrained` fills what is missing with random numbers; and it looks its buckets up.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddexport.families._checkpoint import as_float32
from ddexport.families._weight_file import CheckpointError, read_weights
from ddexport.runtime.errors import DDError
from ddexport.runtime.records import read_json
from ddexport.staging import staged_directory

REST = ("decoder.", "lm_head.")  # what a whole T5 has besides its encoder
NAMED_KEYS = 3


class TextEncoder(nn.Module):
    """A T5 encoder. width: of its outputs, W. words: how many tokens it knows. directory: where it was read
    from."""

    def __init__(self, config: Any, directory: Path) -> None:
        """config: a T5Config of transformers."""
        from transformers import T5EncoderModel

        super().__init__()
        # Plain products and a softmax, whose mask is finite: no row of padding becomes NaN.
        config._attn_implementation = "eager"
        self.width, self.words, self.directory = int(config.d_model), int(config.vocab_size), directory
        self.stack = T5EncoderModel(config).encoder
        attention = self.stack.block[0].layer[0].SelfAttention  # its table serves all layers
        attention.buckets = _Buckets(attention, config)
        # Taken before the method of its class.
        vars(attention)["_relative_position_bucket"] = attention.buckets

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """What the encoder says of the tokens of P prompts.

        Args:
            input_ids: [P, N] int64, right-padded.
            attention_mask: [P, N] int64, 1 for the tokens of a prompt, at least one, and 0 for padding.

        Returns:
            [P, N, W] float32. The rows of padding are not zero, and mean nothing.
        """
        dtype = self.stack.dtype
        # A mask of four axes is added to the scores as it is: one less thing to trace.
        mask = (attention_mask[:, None, None] == 0).to(dtype) * torch.finfo(dtype).min
        output: Tensor = self.stack(input_ids=input_ids, attention_mask=mask).last_hidden_state
        return output.float()

    def tokenizer_file(self, width: int) -> Path:
        """The tokenizer that belongs to the encoder. Raises CheckpointError if there is none beside it, or if
        the encoder has not the width that a model reads."""
        if self.width != width:
            message = f"the encoder in {self.directory} has width {self.width}, but the model reads {width}"
            raise CheckpointError(message, "give the encoder that the model was trained with")
        path = self.directory / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"there is no {path}", "download it from where the encoder is from")
        return path


def text_encoder(path: Path) -> TextEncoder:
    """The encoder of a T5 directory, float32, in evaluation mode. Weights of its decoder are left out.

    path: the directory, with config.json and safetensors; or the file of the weights, or their index, in it.
    Raises CheckpointError unless these are the weights of the encoder that config.json describes, DDError if
    transformers is not installed.
    """
    try:
        from transformers import T5Config
    except ImportError as error:
        hint = 'pip install "ddexport[text-encoder]"'
        raise DDError("exporting a text encoder needs transformers", hint) from error
    directory = path if path.is_dir() else path.parent
    file = directory / "config.json"
    data = read_json(file, CheckpointError)
    try:
        if data["model_type"] != "t5":
            raise ValueError(f"its model_type is {data['model_type']!r}")
        with torch.device("meta"):
            encoder = TextEncoder(T5Config.from_dict(data), directory)
    except Exception as error:  # untrusted, and transformers raises whatever happens
        raise CheckpointError(f"{file} does not describe a T5: {error}", "download it again") from error
    encoder.stack.load_state_dict(_weights(path, encoder.stack.state_dict()), strict=True, assign=True)
    encoder.requires_grad_(False).eval()
    return encoder


def new_text_encoder(width: int, words: int, layers: int, heads: int, hidden: int) -> TextEncoder:
    """An untrained encoder of that width for so many words. hidden: the inner width of its networks."""
    from transformers import T5Config

    config = T5Config(
        vocab_size=words,
        d_model=width,
        d_kv=width // heads,
        d_ff=hidden,
        num_layers=layers,
        num_heads=heads,
        feed_forward_proj="gated-gelu",
        relative_attention_max_distance=32,
        dropout_rate=0.0,
        use_cache=False,
    )
    encoder = TextEncoder(config, Path())
    # Each head prefers some distances from the start. T5's own biases are near zero: for thousands of
    # iterations attention then counts words, and does not learn which belong together.
    nn.init.normal_(encoder.stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight, std=2.0)
    return encoder


def save_text_encoder(encoder: TextEncoder, tokenizer: Any, path: Path) -> None:
    """Writes the directory that `text_encoder` reads, with float16 weights and tokenizer.json, atomically.

    tokenizer: of the package tokenizers.
    """
    from safetensors.torch import save

    with staged_directory(path, replace=True, marker="config.json") as folder:
        config = {k: v for k, v in encoder.stack.config.to_diff_dict().items() if v is not None}
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "t5"}, indent=1) + "\n")
        (folder / "tokenizer.json").write_text(tokenizer.to_str() + "\n")
        state = {f"encoder.{k}": v.half().contiguous() for k, v in encoder.stack.state_dict().items()}
        (folder / "model.safetensors").write_bytes(save(state))


def _weights(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the encoder, under the names that it has by itself."""
    state = {name: value for name, value in dict(read_weights(path)).items() if not name.startswith(REST)}
    embedding = state.pop("shared.weight", None)
    state = {name.removeprefix("encoder."): value for name, value in state.items()}
    if embedding is not None:
        state["embed_tokens.weight"] = embedding
    shared = expected.keys() & state.keys()
    for fault, names in (
        ("lacks", expected.keys() - state.keys()),
        ("has besides", state.keys() - expected.keys()),
        ("has in other shapes", {name for name in shared if state[name].shape != expected[name].shape}),
    ):
        if names:
            told = ", ".join(sorted(names)[:NAMED_KEYS])
            message = f"{path} is not the encoder of its config.json: it {fault} {told}"
            raise CheckpointError(f"{message} ({len(names)} tensors)", "download the whole directory again")
    return {name: as_float32(state[name], f"{path}: {name}") for name in expected}


class _Buckets(nn.Module):
    """The bucket of the distance between two tokens, looked up in a table that transformers computes here.

    Distances 16, 32 and 64 lie on the edge of a bucket: an engine whose logarithm is off by one bit would
    take the one before.
    """

    def __init__(self, attention: Any, config: Any) -> None:
        super().__init__()
        self.far = config.relative_attention_max_distance
        sizes = {"num_buckets": config.relative_attention_num_buckets, "max_distance": self.far}
        distances = torch.arange(-self.far, self.far + 1, device="cpu")
        buckets = attention._relative_position_bucket(distances, **sizes)
        self.register_buffer("table", buckets, persistent=False)

    def forward(self, distances: Tensor, **_: object) -> Tensor:
        """distances: [N, N] int64."""
        buckets: Tensor = self.table[distances.clamp(-self.far, self.far) + self.far]
        return buckets
