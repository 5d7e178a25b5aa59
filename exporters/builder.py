"""ONNX Runtime GenAI's own model builder, with a width of its own for every decoder layer.

The builder makes one decoder graph for prompt and generation out of a loaded PyTorch model, but
takes all layers to be alike, prints, draws bars, and consists of modules that import each other by
bare names. All of that is contained here: what leaves this module builds a graph from a model and
writes it, silently.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from edgeprune.errors import BadInput, one_line
from edgeprune.exporters.deferred import Deferred, DeferredBlocks, Matrix, forget
from edgeprune.exporters.storage import Storage
from edgeprune.nonuniform import CAUSAL_LM, layer_widths

# Caches as short as the window would break generation that is shorter than the window.
_OPTIONS = {"accuracy_level": 4, "windowed_kv_cache": False}

_Untyped: Any = object  # the builder's classes are known only once they are imported

# Top-level names that the builder's modules claim while they import each other.
_BARE_NAMES = (
    "builder",
    "builders",
    "quantization",
    "loaders",
    "builder_config",
    "kv_cache_variant",
)
_importing = threading.Lock()

# The builder's class of each family, by the kind of rotary embedding: what it does with any other
# kind is wrong or an error. It has no class for OLMo2, whose post-norm layers `make_layer` below
# lays out.
_LLAMA = {"default": "LlamaModel", "llama3": "LlamaModel"}
_BUILDER_CLASSES = {
    "llama": _LLAMA,
    "mistral": dict.fromkeys(("default", "linear", "yarn"), "MistralModel"),
    "qwen2": dict.fromkeys(("default", "linear", "yarn"), "QwenModel"),
    "qwen3": dict.fromkeys(("default", "linear", "yarn"), "Qwen3Model"),
    "smollm3": {"default": "SmolLM3Model"},
    "gemma3_text": {"default": "Gemma3Model"},
    "phi3": {"default": "Phi3MiniModel", "longrope": "Phi3MiniLongRoPEModel"},
    "granite": dict.fromkeys(("default", "linear", "yarn"), "GraniteModel"),
    "olmo2": _LLAMA,
}

# What genai_config.json calls a family, where the runtime does not derive it from the
# architecture's name.
_RUNTIME_TYPES = {"gemma3_text": "gemma3_text", "olmo2": "olmo"}


@dataclass(frozen=True)
class Layout:
    """Names of the norms before and after each half of a decoder layer, None for no norm."""

    before_attention: str | None
    after_attention: str | None
    before_mlp: str | None
    after_mlp: str | None


_PRE_NORM = Layout("input_layernorm", None, "post_attention_layernorm", None)
_LAYOUTS = {
    "gemma3_text": Layout(
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "olmo2": Layout(None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
}


_FLOATS = {16: torch.float16, 32: torch.float32}
_ONNX_TYPES = {torch.float16: "FLOAT16", torch.float32: "FLOAT", torch.uint8: "UINT8"}


class QuantizedLinear:
    """A linear layer with its weight in blocks, under the names that the builder looks for."""

    g_idx = None

    def __init__(self, blocks: DeferredBlocks) -> None:
        self.qweight = blocks.weight
        self.scales = blocks.scales
        self.bits = blocks.bits
        self.group_size = blocks.block
        self.in_features = blocks.columns
        self.out_features = blocks.rows
        if blocks.zeros is not None:
            self.qzeros = blocks.zeros


class _PerLayer(_Untyped):
    """Mixed in before one of the builder's classes: widths by layer, weights by one ``Storage``."""

    weights: PreTrainedModel

    def prepare(
        self,
        model: PreTrainedModel,
        storage: Storage,
        on_layer: Callable[[int], None],
    ) -> None:
        """Take the loaded model, after the builder's own ``__init__``."""
        self.source = model
        self.storage = storage
        self.on_layer = on_layer
        self.family = model.config.model_type
        self.layout = _LAYOUTS.get(self.family, _PRE_NORM)
        self.widths = layer_widths(model.config)
        self.table: DeferredBlocks | None = None
        self.written = 0
        self.tied = bool(getattr(model.config, "tie_word_embeddings", False))
        # whether ``skip_input`` holds something that the residual stream has not taken in yet
        self.pending = False
        if self.family == "gemma3_text":
            self.embed_attrs["scale"] = self.hidden_size**0.5  # the builder rounds it to two places
        if self.family == "olmo2":
            self.attention_attrs.update(q_norm=True, k_norm=True)
        self._drop_caches_of_removed_attention()

    def _drop_caches_of_removed_attention(self) -> None:
        removed = [i for i, widths in enumerate(self.widths) if not widths.num_attention_heads]
        for names in (self.input_names, self.output_names):
            for key, by_layer in names.items():
                if key.startswith(("past_key_values", "present")):
                    for i in removed:
                        del by_layer[i]

    # -- what the builder asks while it walks the model ----------------------------------------

    def load_weights(self, _input_path: str) -> PreTrainedModel:
        return self.source

    def is_layer(self, module: torch.nn.Module) -> bool:
        return any(module is layer for layer in self.source.model.layers)

    def has_final_norm(self, module: torch.nn.Module, _model: PreTrainedModel) -> bool:
        return module is self.source.model.norm

    def has_lm_head(self, module: torch.nn.Module) -> bool:
        return module is self.source.lm_head

    def make_key_value_cache_shape(self, layer_id: int, shape: list[Any]) -> list[Any]:
        # heads and head size static: the runtime sizes each layer's cache by them
        batch, _, length, _ = super().make_key_value_cache_shape(layer_id, shape)
        return [batch, self.widths[layer_id].num_key_value_heads, length, self.head_size]

    def make_value(self, name: str, dtype: Any = None, shape: Any = None) -> Any:
        # "sequence_length * num_attention_heads" means another length in every layer
        if shape is not None:
            heads = f"{self.num_attn_heads}:{self.num_kv_heads}"
            shape = [f"{d} {heads}" if isinstance(d, str) and "*" in d else d for d in shape]
        return super().make_value(name, dtype, shape)

    # -- layers --------------------------------------------------------------------------------

    def make_layer(self, layer_id: int, layer: torch.nn.Module) -> None:
        self._use_widths(layer_id)
        layout = self.layout
        if self.num_attn_heads:
            root = self._enter(layer_id, layer, layout.before_attention)
            self.make_attention(layer_id, layer.self_attn, root_input=root)
            self._leave(layer_id, layer, layout.after_attention, "attention")
        if self.intermediate_size:
            root = self._enter(layer_id, layer, layout.before_mlp)
            self.make_mlp(layer_id, layer.mlp, root_input=root)
            self._leave(layer_id, layer, layout.after_mlp, "mlp")
        self.layernorm_attrs["last_layernorm"] = layer_id == self.num_layers - 1

    def _use_widths(self, layer_id: int) -> None:
        widths = self.widths[layer_id]
        self.num_attn_heads = widths.num_attention_heads
        self.num_kv_heads = widths.num_key_value_heads
        self.intermediate_size = widths.intermediate_size
        self.q_size = self.num_attn_heads * self.head_size
        self.kv_size = self.num_kv_heads * self.head_size

    def _enter(self, layer_id: int, layer: torch.nn.Module, norm: str | None) -> str:
        """Name the value that a half of the layer reads: the residual stream, or its norm."""
        if norm is None:
            return self._residual(layer_id)
        self.make_layernorm(
            layer_id, getattr(layer, norm), skip=True, simple=True, location=_location(norm)
        )
        return self.layernorm_attrs["output_0"]

    def _leave(self, layer_id: int, layer: torch.nn.Module, norm: str | None, half: str) -> None:
        """Make the half's output (``skip_input``) ready to be added to the residual stream."""
        scale = getattr(self, "residual_scale", 1)
        if scale != 1:
            name = f"/model/layers.{layer_id}/residual_mul/{half}"
            constant = f"/model/constants/{self.to_str_dtype(self.io_dtype)}/{scale}"
            inputs = [self.layernorm_attrs["skip_input"], constant]
            self.make_mul(name, inputs, dtype=self.io_dtype, shape=self.make_hidden_state_shape())
            self.layernorm_attrs["skip_input"] = f"{name}/output_0"
        if norm is not None:
            stream = self.layernorm_attrs["root_input"]
            self.layernorm_attrs["root_input"] = self.layernorm_attrs["skip_input"]
            self.pending = False
            self.make_layernorm(
                layer_id, getattr(layer, norm), skip=False, simple=True, location=_location(norm)
            )
            self.layernorm_attrs["root_input"] = stream
            self.layernorm_attrs["skip_input"] = self.layernorm_attrs["output_0"]
        self.pending = True

    def _residual(self, layer_id: int) -> str:
        """Add what is pending to the residual stream where no norm does it."""
        if self.pending:
            name = f"/model/layers.{layer_id}/residual/{len(self.node_names)}/Add"
            inputs = [self.layernorm_attrs["root_input"], self.layernorm_attrs["skip_input"]]
            self.make_add(name, inputs, dtype=self.io_dtype, shape=self.make_hidden_state_shape())
            self.layernorm_attrs["root_input"] = f"{name}/output_0"
            self.pending = False
        return self.layernorm_attrs["root_input"]

    def make_layernorm(
        self, layer_id: int, layernorm: Any, skip: bool, simple: bool, location: str
    ) -> None:
        # a norm after which nothing was added (first layer, removed halves) must not add its own
        # input again
        skip = skip and self.pending
        super().make_layernorm(layer_id, layernorm, skip, simple, location)
        self.pending = False

    def make_attention(self, layer_id: int, attention: Any, root_input: str, **kwargs: Any) -> None:
        no_rope_layers = getattr(self, "no_rope_layers", None)
        self.attention_attrs["rope"] = no_rope_layers is None or bool(no_rope_layers[layer_id])
        super().make_attention(layer_id, attention, root_input, **kwargs)

    def make_qk_norm(self, layer_id: int, attention: Any) -> None:
        if self.family != "olmo2":
            super().make_qk_norm(layer_id, attention)
            return
        # OLMo2 norms all heads of a token together
        for path, norm in (("q_path", attention.q_norm), ("k_path", attention.k_norm)):
            name = f"/model/layers.{layer_id}/attn/{path[0]}_norm/SimplifiedLayerNormalization"
            weight = f"model.layers.{layer_id}.attn.{path[0]}_norm.layernorm.weight"
            self.make_initializer(norm.weight, weight, to=self.io_dtype)
            self.make_node(
                "SimplifiedLayerNormalization",
                inputs=[self.attention_attrs[path], weight],
                outputs=[f"{name}/output_0"],
                name=name,
                epsilon=self.layernorm_attrs["epsilon"],
                axis=-1,
                stash_type=1,
            )
            shape = self.make_hidden_state_shape(last_dim=norm.weight.shape[0])
            self.make_value(f"{name}/output_0", self.io_dtype, shape=shape)
            self.attention_attrs[path] = f"{name}/output_0"

    # -- weights -------------------------------------------------------------------------------

    def make_initializer(self, tensor: Any, /, name: str, **kwargs: Any) -> None:
        if not isinstance(tensor, Deferred):
            super().make_initializer(tensor, name, **kwargs)
            return
        ir = _modules().ir
        layer = self.layer_id  # how many layers are written when this one's turn comes

        def values() -> Deferred:
            self.wrote_layers(layer)
            return tensor

        dtype = ir.DataType[_ONNX_TYPES[tensor.dtype]]
        lazy = ir.LazyTensor(values, dtype=dtype, shape=ir.Shape(tensor.shape), name=name)
        value = self.make_value(name, lazy.dtype, lazy.shape)
        value.const_value = lazy
        self.model.graph.register_initializer(value)

    def wrote_layers(self, count: int) -> None:
        """Report that the weights of so many layers are in the file."""
        while self.written < count:
            self.written += 1
            self.on_layer(self.written)

    def make_packed_matmul_float_class(self, *projections: Any, **_kwargs: Any) -> Any:
        return SimpleNamespace(weight=Matrix(*(each.weight for each in projections)))

    def make_matmul(self, matmul: Any, basename: str, root_input: str, **kwargs: Any) -> str:
        bits = self.storage.table_bits if basename == "/lm_head/MatMul" else self.storage.body_bits
        if bits >= 16:
            return self._make_matmul_float(matmul, basename, root_input, bits, **kwargs)
        if basename == "/lm_head/MatMul" and self.tied:
            blocks = self._table_blocks(matmul.weight)
        else:
            blocks = DeferredBlocks(_matrix(matmul.weight), bits, self.storage.block)
        return self.make_matmul_nbits(QuantizedLinear(blocks), basename, root_input, **kwargs)

    def _make_matmul_float(
        self, matmul: Any, name: str, root_input: str, bits: int, **kwargs: Any
    ) -> str:
        tied_head = name == "/lm_head/MatMul" and self.tied
        weight = "model.embed_tokens.weight" if tied_head else _initializer(name)
        if not tied_head:
            values = _matrix(matmul.weight).floats(_FLOATS[bits], transposed=True)
            self.make_initializer(values, weight)
        rows, columns = matmul.weight.shape
        shape = [rows, columns] if tied_head else [columns, rows]
        if bits == 16:  # folded into a float32 constant when the model is loaded
            self.make_cast(f"{name}/Cast", weight, self.io_dtype, shape=shape)
            weight = f"{name}/Cast/output_0"
        if tied_head:
            self.make_transpose(f"{name}/Transpose", weight, self.io_dtype, shape[::-1], [1, 0])
            weight = f"{name}/Transpose/output_0"
        output = "logits" if kwargs.get("logits") else f"{name}/output_0"
        self.make_node("MatMul", inputs=[root_input, weight], outputs=[output], name=name)
        self.make_value(output, self.io_dtype, shape=self.make_hidden_state_shape(last_dim=rows))
        return name

    def make_embedding_lookup(self, embedding: Any, basename: str, _lm_head: Any) -> str:
        bits = self.storage.table_bits
        if bits >= 16:
            return self._make_float_lookup(embedding, basename, bits)
        blocks = self._table_blocks(embedding)
        prefix = "lm_head.MatMulNBits" if self.tied else "model.embed_tokens"
        names = [f"{prefix}.qweight", f"{prefix}.scales"]
        if blocks.zeros is not None:
            names.append(f"{prefix}.qzeros")
        if not self.tied:
            tensors = (blocks.weight, blocks.scales, blocks.zeros)
            for name, values in zip(names, tensors, strict=False):  # no zeros at 8 bits
                self.make_initializer(values, name)
        return self._make_quantized_lookup(basename, names, blocks)

    def _table_blocks(self, weight: torch.Tensor) -> DeferredBlocks:
        """The quantized embedding table, which is the head as well where the two are tied."""
        if self.table is None:
            bits, block = self.storage.table_bits, self.storage.block
            self.table = DeferredBlocks(_matrix(weight), bits, block)
        return self.table

    def _make_float_lookup(self, embedding: Any, basename: str, bits: int) -> str:
        values = _matrix(embedding).floats(_FLOATS[bits], transposed=False)
        self.make_initializer(values, "model.embed_tokens.weight")
        name = f"{basename}/Gather"
        inputs = ["model.embed_tokens.weight", self.input_names["input_ids"]]
        self.make_node("Gather", inputs=inputs, outputs=[f"{name}/output_0"], name=name)
        if bits == 32:
            return f"{name}/output_0"
        shape = self.make_hidden_state_shape()
        self.make_value(f"{name}/output_0", _modules().ir.DataType.FLOAT16, shape=shape)
        self.make_cast(f"{basename}/Cast", f"{name}/output_0", self.io_dtype, shape=shape)
        return f"{basename}/Cast/output_0"

    def _make_quantized_lookup(
        self, basename: str, names: list[str], blocks: DeferredBlocks
    ) -> str:
        """Gather rows of the quantized table and cut off the padding of their last block."""
        shape = [blocks.rows, blocks.row_bytes]
        flat = [names[0], f"/model/constants/INT64/{shape}"]
        uint8 = _modules().ir.DataType.UINT8
        self.make_reshape(f"{basename}/Reshape", flat, dtype=uint8, shape=shape)
        name = f"{basename}/GatherBlockQuantized"
        output = f"{name}/output_0"
        self.make_node(
            "GatherBlockQuantized",
            inputs=[f"{basename}/Reshape/output_0", self.input_names["input_ids"], *names[1:]],
            outputs=[output],
            name=name,
            domain="com.microsoft",
            bits=blocks.bits,
            block_size=blocks.block,
            gather_axis=0,
            quantize_axis=1,
        )
        padded = blocks.row_bytes * 8 // blocks.bits
        if padded == self.hidden_size:
            return output
        self.make_value(output, self.io_dtype, shape=self.make_hidden_state_shape(last_dim=padded))
        ends = ("[0]", f"[{self.hidden_size}]", "[-1]")
        inputs = [output, *(f"/model/constants/INT64/{end}" for end in ends)]
        self.make_slice(
            f"{basename}/Slice", inputs, dtype=self.io_dtype, shape=self.make_hidden_state_shape()
        )
        return f"{basename}/Slice/output_0"

    def make_lm_head(self, lm_head: Any) -> None:
        super().make_lm_head(lm_head)
        self.table = None


def _matrix(weight: torch.Tensor | Matrix) -> Matrix:
    return weight if isinstance(weight, Matrix) else Matrix(weight)


def _location(norm: str) -> str:
    return norm.removesuffix("_layernorm")


def _initializer(node: str) -> str:
    return node[1:].replace("/", ".") + ".weight"


# -- containing the builder's modules ----------------------------------------------------------


@dataclass(frozen=True)
class _Builder:
    """The builder's modules that are used here."""

    main: ModuleType
    classes: ModuleType
    base: ModuleType
    ir: ModuleType


@cache
def _modules() -> _Builder:
    """Import the builder, and take its names and its folder out of everybody's sight again."""
    with _importing, _bare_names():
        main = importlib.import_module("builder")
        classes = importlib.import_module("builders")
        base = importlib.import_module("builders.base")
        for name, module in list(sys.modules.items()):
            if _is_bare(name):
                # a global of that name hides the built-in: the builder reports by printing
                module.print = _silent  # type: ignore[attr-defined]
        base.tqdm = _NoBar  # type: ignore[attr-defined]
        return _Builder(main, classes, base, base.ir)


@contextmanager
def _bare_names() -> Iterator[None]:
    """Let the builder's modules find each other, and nothing else find them."""
    package = importlib.import_module("onnxruntime_genai")
    folder = str(Path(package.__file__ or "").parent / "models")
    theirs = {name: module for name, module in sys.modules.items() if _is_bare(name)}
    for name in theirs:
        del sys.modules[name]
    path = list(sys.path)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path[:] = path  # onnxruntime's own tools add themselves too
        for name in [name for name in sys.modules if _is_bare(name)]:
            del sys.modules[name]
        sys.modules.update(theirs)


def _is_bare(name: str) -> bool:
    return name.partition(".")[0] in _BARE_NAMES


def _silent(*_args: Any, **_kwargs: Any) -> None:
    """Stand in for ``print``."""


class _NoBar:
    """Stands in for tqdm, of which the builder uses this much."""

    total: int | None = None

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *_exception: object) -> None:
        return None

    def update(self, _n: int = 1) -> None:
        """Count silently."""

    def set_description(self, _text: str) -> None:
        """Describe silently."""


# -- what the rest of edgeprune calls ----------------------------------------------------------


def check_supported(config: PreTrainedConfig) -> None:
    """Raise BadInput, naming what can be exported, if there is no builder for this model."""
    classes = _BUILDER_CLASSES.get(config.model_type)
    if classes is None:
        raise BadInput(
            f"models of type '{config.model_type}' cannot be exported to ONNX; "
            f"types that can: {', '.join(_BUILDER_CLASSES)}"
        )
    for rope_type in _rope_types(config):
        if rope_type not in classes:
            raise BadInput(
                f"the rotary embedding '{rope_type}' of this {config.model_type} model cannot be "
                f"exported to ONNX; kinds that can: {', '.join(classes)}"
            )


def build(
    model: PreTrainedModel,
    tokenizer: Any,
    folder: Path,
    storage: Storage,
    on_layer: Callable[[int], None],
) -> None:
    """Write the graph, the weights and ``genai_config.json`` of a loaded model into ``folder``.

    ``folder`` must already hold the tokenizer and, if the model has one, its generation config.
    ``on_layer`` is called with the number of decoder layers done. Matrices are converted one at a
    time, when they are written; norms and biases become float32 in the model itself.
    """
    _widen_vectors(model)
    modules = _modules()
    config = _builder_config(model.config, folder)
    modules.main.add_special_token_ids(config, tokenizer)
    cls = _class_for(_BUILDER_CLASSES[model.config.model_type][_rope_types(model.config)[0]])
    float32 = modules.ir.DataType.FLOAT
    with torch.no_grad(), _refusing():
        graph: Any = cls(config, float32, float32, "cpu", str(folder / "cache"), dict(_OPTIONS))
        graph.model_type = _RUNTIME_TYPES.get(model.config.model_type, graph.model_type)
        graph.prepare(model, storage, on_layer)
        graph.make_model("")
        try:
            graph.save_model(str(folder))
        finally:
            forget()
        graph.wrote_layers(graph.num_layers)
    graph.make_genai_config(config, {}, str(folder))


def _widen_vectors(model: PreTrainedModel) -> None:
    """Make norms and biases float32: the builder computes with them."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() < 2 and parameter.dtype != torch.float32:
                setattr(module, name, torch.nn.Parameter(parameter.detach().float()))


@cache
def _class_for(name: str) -> type:
    base = getattr(_modules().classes, name)
    return type(f"PerLayer{base.__name__}", (_PerLayer, base), {})


@contextmanager
def _refusing() -> Iterator[None]:
    """Turn what the builder says it cannot do into BadInput."""
    try:
        yield
    except NotImplementedError as error:
        raise BadInput(f"the model cannot be exported to ONNX: {one_line(error)}") from error


def _rope_types(config: PreTrainedConfig) -> list[str]:
    """Kinds of rotary embedding in the model: one, or for Gemma 3 one for each kind of layer."""
    rope = config.rope_parameters
    kinds = [rope] if "rope_type" in rope else [r for r in rope.values() if isinstance(r, dict)]
    return [kind.get("rope_type", "default") for kind in kinds]


def _builder_config(config: PreTrainedConfig, folder: Path) -> PreTrainedConfig:
    """The dense config in the words of the builder, which were transformers' words once."""
    values = config.to_dict()
    for key in ("per_layer_config", "auto_map", "quantization_config"):
        values.pop(key, None)
    family = values.pop("model_type")
    values["architectures"] = [CAUSAL_LM[family]]
    values["_name_or_path"] = str(folder)
    result = AutoConfig.for_model(family, **values)
    if family == "gemma3_text":
        result.rope_local_base_freq = result.rope_parameters["sliding_attention"]["rope_theta"]
        result.rope_parameters = dict(result.rope_parameters["full_attention"])
    if getattr(result, "layer_types", None) is None and getattr(result, "sliding_window", None):
        result.layer_types = ["sliding_attention"] * result.num_hidden_layers
    return result
