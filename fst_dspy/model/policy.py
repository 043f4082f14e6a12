"""The slow weights: a causal language model, and the versions kept of its weights.

A version id is ``"<name>@<12 hex digits>"``, a content hash: the same weights have the same id in
every process, and different weights never share one. ``"<name>@live"`` names whatever the weights
are at the moment; it moves with every optimizer step and is never cached.

Nothing is copied at load. The base weights are read again from where they came when they are first
needed after they changed, and their hash is checked; so training needs no preparation, and LoRA,
whose base never changes, needs no copy at all.
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils import logging as hf_logging

from fst_dspy import distributed
from fst_dspy.config import LoraConfig
from fst_dspy.errors import ModelError
from fst_dspy.model.cache_layers import cache_name
from fst_dspy.model.hardware import as_current, default_dtype, device_named, fuse_norms
from fst_dspy.model.sizes import check_claims, described, parameter_count
from fst_dspy.pretrained.chat import content_form
from fst_dspy.pretrained.gguf import SUFFIX, read_from, read_gguf
from fst_dspy.pretrained.places import model_place
from fst_dspy.pretrained.quantized import plain_quantization, quantization_of
from fst_dspy.pretrained.weights import read_whole

DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
LIVE = "live"
HASHED_TOGETHER = 2**21
"""Bytes of a weight that are hashed in one go; of larger ones, such parts side by side: hashing a
model of a GPU's size on one core would take as long as an optimizer step."""
LOOKS_AHEAD = 0.1
"""How much of its logits may depend on what comes later, which is rounding."""
_OWN, _VISITING = "default", "visiting"  # names of the live adapter and of one swapped in


@dataclass(frozen=True)
class _Kept:
    """A copy of weights on the CPU: all of them, or the adapters that sit on the base."""

    lora: LoraConfig | None
    tensors: Mapping[str, Tensor]


class Policy:
    """A causal LM with its tokenizer: the live weights, and versions kept of them.

    Made with ``Policy.load``. Whoever generates, trains or swaps weights holds ``lock``.

    Attributes:
        model: The live model, updated in place; wrapped by peft after ``add_lora``.
        tokenizer: Has a chat template and a pad token, given here if the files had none that the
            model knows.
        name: First half of every version id: the last part of the folder name or hub id.
        step: Optimizer steps taken since the weights were loaded; the trainer counts it.
        context_length: Tokens that prompt and completion may have together.
        base_version: Version id of the weights as loaded.
        device, lock: Where the weights are, and the lock that guards them.
        generator: What generates in place of ``fst_dspy.model.generate.generate``, with its
            signature.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        source: Mapping[str, Any],
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = re.sub(r"[^\w.-]", "-", name)
        self.lock = threading.RLock()
        self.step = 0
        self.generator: Any | None = None
        self.source = dict(source)
        self.context_length = _context_length(model.config, tokenizer)
        # peft moves modules about but keeps the parameters, so these names hold for good.
        self._weights: dict[str, torch.nn.Parameter] = dict(model.named_parameters())
        # Not those of bitsandbytes, which are whole numbers.
        self._with_gradient = [weight for weight in self._weights.values() if weight.requires_grad]
        self._lora: LoraConfig | None = None
        self._kept: dict[str, _Kept] = {}
        self._visiting: str | None = None
        self._hashed: tuple[Any, str] | None = None
        self._base_hash = _hash(self._weights)
        self.base_version = self._version_id(self._base_hash)

    def __deepcopy__(self, memo: dict[int, Any]) -> Policy:
        return self

    @property
    def device(self) -> torch.device:
        return next(iter(self._weights.values())).device

    @property
    def lora(self) -> LoraConfig | None:
        """The adapters' settings, or ``None`` when all weights are trained."""
        return self._lora

    @property
    def lora_in_use(self) -> LoraConfig | None:
        """The settings of the adapters that answer now: inside ``at`` those of that version."""
        if self._visiting is not None:
            return self.lora_of(self._visiting)
        return self._lora

    @property
    def visiting(self) -> str | None:
        """The version that ``at`` has swapped in, inside its block."""
        return self._visiting

    def write_adapter(self, folder: Path) -> Path:
        """Write the adapters that are in use, as peft does; the caller holds ``lock``.

        Returns:
            The folder that ``adapter_config.json`` is in.
        """
        name = self.model.active_adapter
        self.model.save_pretrained(folder, selected_adapters=[name], save_embedding_layers=False)
        return folder if name == _OWN else folder / name

    @classmethod
    def load(
        cls,
        name_or_path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        trust_remote_code: bool = False,
        quantization_config: Any = None,
        name: str | None = None,
    ) -> Policy:
        """Load a model.

        Args:
            name_or_path: ``"embedded"`` for the model in the package, ``"smollm2"`` for a real one
                that is fetched once (see ``fst_dspy.pretrained.smollm2``), a folder, a GGUF file
                or a folder with one, which is unpacked, or a hub id.
            device: Defaults to CUDA where there is one; of several processes, each has its own.
            dtype: A torch dtype or its name; by default bfloat16 on CUDA and, for large models, on
                CPUs that multiply it, else float32 (``fst_dspy.model.hardware.default_dtype``).
            trust_remote_code: Run Python code that comes with the model. Off unless asked for.
            quantization_config: Of transformers, to load weights in fewer bits by bitsandbytes or
                torchao, to train adapters over (``fst_dspy.pretrained.quantized``).
            name: First half of the version ids; defaults to the last part of ``name_or_path``.

        Returns:
            The policy. A tokenizer without a chat template gets a plain one, ``role: content``.

        Raises:
            ModelError: The model does not exist, cannot be reached or cannot be read, its
                ``config.json`` asks for more memory than its files can fill, or its chat template
                shows nothing of what a user says.
            ConfigError: Several processes were set up to hold parts of the model.
        """
        device = device_named(device)
        distributed.join(device.type)
        quantized = plain_quantization(quantization_config)
        where = model_place(name_or_path)
        if quantized is not None and where.endswith(SUFFIX):
            raise ModelError(
                "a GGUF file is unpacked, and not quantized as it is loaded: save the model as a "
                "folder with policy.model.save_pretrained, and load that"
            )
        try:
            named, more = read_from(where)
            # Before the tokenizer, which reads the configuration too. Code that is trusted may
            # build what it likes.
            if str(name_or_path) != "embedded" and not trust_remote_code:
                check_claims(Path(where))
            if dtype is None:
                dtype = default_dtype(
                    device,
                    lambda: parameter_count(described(where, trust_remote_code=trust_remote_code)),
                )
            dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
            tokenizer = AutoTokenizer.from_pretrained(
                named, trust_remote_code=trust_remote_code, **more
            )
            if not tokenizer("words", add_special_tokens=False)["input_ids"]:
                # Of a folder without one transformers makes an empty one of the model's kind.
                raise ModelError("it comes without a tokenizer")
            source = {
                "name_or_path": str(name_or_path),
                "place": where,
                "dtype": str(dtype).removeprefix("torch."),
                "trust_remote_code": trust_remote_code,
                **({} if quantized is None else {"quantization_config": quantized}),
            }
            model = _read_model(source, device)
            cache_name(model)  # refuses what could not answer
            _check_causal(model)
            if device.type == "cuda":
                fuse_norms(model)
        except Exception as error:
            raise ModelError(
                f"cannot load the model {str(name_or_path)!r} ({type(error).__name__}: {error}); "
                'give "embedded", "smollm2", a folder with config.json, weights and tokenizer, a '
                "GGUF file, or the id of a model on the Hugging Face hub that this machine can "
                "reach"
            ) from error
        if tokenizer.chat_template is None:
            tokenizer.chat_template = _plain_template(tokenizer)
        if content_form(tokenizer) is None:
            raise ModelError(
                f"the chat template of {str(name_or_path)!r} shows nothing of what a user says, so "
                "that every prompt would be empty; give the tokenizer another chat_template, or "
                "None for a plain one"
            )
        known = model.get_input_embeddings().weight.shape[0]
        if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= known:
            # One that was added to the tokenizer alone is none that the model could read.
            end = tokenizer.eos_token_id
            usable = end if end is not None and end < known else 0
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(usable)
        short = Path(str(name_or_path).rstrip("/")).name.removesuffix(SUFFIX)
        return cls(model, tokenizer, name or short, source)

    # --- which weights ----------------------------------------------------------------------------

    def weights_hash(self) -> str:
        """SHA-256 over the live weights: names, dtypes, shapes and bytes, tied weights once.

        Under LoRA it covers the adapters, their settings and the hash of the base.
        """
        key = self.mark()
        if self._hashed is None or self._hashed[0] != key:
            salt = "" if self._lora is None else f"{self._base_hash} {self._lora}"
            self._hashed = (key, _hash(self._trainable(), salt))
        return self._hashed[1]

    def version(self) -> str:
        """Version id of the weights in use: the live ones, or inside ``at`` those."""
        with self.lock:
            return self._visiting or self._version_id(self.weights_hash())

    def mark(self) -> Any:
        """Changes whenever the weights in the model may have: spares hashing a large model."""
        weights = list(_plain(self._trainable()).values())
        sample = torch.cat([weight.detach().reshape(-1)[:4].float() for weight in weights])
        counters = tuple((weight.data_ptr(), weight._version) for weight in weights)
        return self._lora, self.step, counters, tuple(sample.tolist())

    @property
    def live_id(self) -> str:
        """``"<name>@live"``, the id that follows the live weights."""
        return f"{self.name}@{LIVE}"

    def has(self, version: str) -> bool:
        """Whether ``at`` and ``restore`` can serve a version."""
        if version in self._kept or version in (self.live_id, self.base_version):
            return True
        return version == self.version()

    def trainable_state(self, *, copy: bool = True) -> dict[str, Tensor]:
        """The weights that training changes (adapters only under LoRA), on the CPU.

        Args:
            copy: Give copies also where the weights are on the CPU, so that no step changes them.
        """
        with self.lock:
            return {
                name: weight.detach().to("cpu", copy=copy)
                for name, weight in self._trainable().items()
            }

    def lora_of(self, version: str) -> LoraConfig | None:
        """The adapters' settings of a version, if it has any.

        Raises:
            ModelError: The version is not kept.
        """
        with self.lock:
            if version == self.base_version:
                return None
            if version in self._kept:  # inside ``at`` it is not the live weights that it has
                return self._kept[version].lora
            return self._lora if version == self.version() else self._find(version).lora

    def kept_state(self, version: str) -> Mapping[str, Tensor]:
        """The weights of a kept version, on the CPU; they are not changed any more.

        Raises:
            ModelError: The version is not kept.
        """
        with self.lock:
            return self._find(version).tensors

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what ``trainable_state`` gave.

        Raises:
            ModelError: The tensors are not those of this model, or the adapters differ.
        """
        with self.lock:
            _fill(self._trainable(), state)

    # --- versions ---------------------------------------------------------------------------------

    def keep(self) -> str:
        """Keep a copy of the live weights under their version id, which is returned."""
        with self.lock:
            version = self.version()
            if version not in self._kept:
                self._kept[version] = _Kept(self._lora, self.trainable_state())
            return version

    def forget(self, version: str) -> None:
        """Drop a kept version. The base version can always be read again."""
        with self.lock:
            self._kept.pop(version, None)

    def restore(self, version: str) -> None:
        """Make a kept version, or the base, the live weights; adapters come or go with it.

        Raises:
            ModelError: The version is not kept.
        """
        with self.lock:
            if version == self.live_id or version == self.version():
                return
            kept = self._find(version)
            if kept.lora != self._lora:
                self._unwrap()
                if kept.lora is not None:
                    self.add_lora(kept.lora, seed=0)
            _fill(self._trainable(), kept.tensors)

    @contextmanager
    def at(self, version: str) -> Iterator[None]:
        """Use a version's weights inside the block, under ``lock``; then put the live ones back.

        Threads other than the caller's must not generate meanwhile: they would wait for the lock.

        Raises:
            ModelError: The version is not kept, or another one is already swapped in.
        """
        with self.lock:
            if version == self.live_id or version == self.version():
                yield
                return
            if self._visiting is not None:
                raise ModelError(f"cannot swap in {version} while {self._visiting} is swapped in")
            kept, hashed = self._find(version), self._hashed
            with ExitStack() as stack:
                if self._lora is not None and kept.lora is None:
                    stack.enter_context(self.model.disable_adapter())
                    if version != self.base_version:
                        stack.enter_context(_swapped(self._weights, kept.tensors))
                elif self._lora == kept.lora:
                    stack.enter_context(_swapped(self._trainable(), kept.tensors))
                else:
                    stack.enter_context(self._visit(kept))
                self._visiting = version
                try:
                    yield
                finally:
                    self._visiting = None
            if hashed is not None:  # the same weights as before, so the same hash
                self._hashed = (self.mark(), hashed[1])

    @contextmanager
    def holding(self, state: Mapping[str, Tensor]) -> Iterator[None]:
        """Use other trained weights inside the block, under ``lock``; then put the live ones back.

        Args:
            state: As ``trainable_state`` gives it, in any dtype.

        Raises:
            ModelError: The tensors are not those of this model, or the adapters differ.
        """
        with self.lock:
            hashed = self._hashed
            with _swapped(self._trainable(), state):
                yield
            if hashed is not None:  # the same weights as before, so the same hash
                self._hashed = (self.mark(), hashed[1])

    def add_lora(self, cfg: LoraConfig, seed: int) -> None:
        """Put fresh adapters on every linear layer but the output; only they are trained.

        The last layer of Mamba's mixers, which its kernels read past them, has none. Adapters that
        were there are dropped. The first weights depend on ``seed`` alone.

        Raises:
            ModelError: The live weights are not the base: adapters on them could not be named.
        """
        with self.lock:
            self._unwrap()
            if self.version() != self.base_version:
                raise ModelError(
                    f"LoRA needs the base weights {self.base_version}, and {self.version()} was "
                    "trained whole: train it on with lora=False, start from the base "
                    f"(lm.at({self.base_version!r})), or export what was trained and load that "
                    "folder as a model of its own"
                )
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                torch.manual_seed(seed)
                self.model = _wrap(self.model, cfg, _OWN)
            self._lora = cfg

    def adapter_shapes(self, cfg: LoraConfig) -> dict[str, tuple[int, ...]]:
        """The shapes of the weights that ``add_lora`` makes; see the function of this name."""
        return adapter_shapes(self.model, cfg)

    # --- inside -----------------------------------------------------------------------------------

    def _trainable(self) -> dict[str, torch.nn.Parameter]:
        return self._weights if self._lora is None else _adapter(self.model, _OWN)

    def _version_id(self, digest: str) -> str:
        return f"{self.name}@{digest[:12]}"

    def _find(self, version: str) -> _Kept:
        if version in self._kept:
            return self._kept[version]
        if version == self.base_version:
            return self._read_base()
        raise ModelError(
            f"the weights {version} are not at hand; kept are "
            f"{', '.join(sorted({*self._kept, self.base_version}))} and the live {self.version()}"
        )

    def _read_base(self) -> _Kept:
        if self._lora is not None:
            # Under LoRA the base lies beneath the adapters, unchanged.
            return _Kept(None, self._weights)
        try:
            model = _read_model(self.source, torch.device("cpu"))
        except Exception as error:
            raise ModelError(f"cannot read the base weights again: {error}") from error
        weights = dict(model.named_parameters())
        if _hash(weights) != self._base_hash:
            raise ModelError(
                f"the files of {self.source['name_or_path']!r} have changed since they were loaded "
                f"as {self.base_version}"
            )
        self._kept[self.base_version] = _Kept(None, {k: w.detach() for k, w in weights.items()})
        return self._kept[self.base_version]

    @contextmanager
    def _visit(self, kept: _Kept) -> Iterator[None]:
        """Adapters of another shape than the live ones: beside those, which keep their place."""
        assert kept.lora is not None
        live_lora, live_model = self._lora, self.model
        with ExitStack() as stack:
            if live_lora is None:
                base = self._find(self.base_version)
                stack.enter_context(_swapped(self._weights, base.tensors))
                self.model = _wrap(live_model, kept.lora, _VISITING)
            else:
                self.model.add_adapter(
                    _VISITING, _peft_config(self.model.get_base_model(), kept.lora)
                )
                self.model.set_adapter(_VISITING)
            try:
                _fill(_adapter(self.model, _VISITING), kept.tensors)
                self.model.eval()
                yield
            finally:
                if live_lora is None:
                    self._unwrap()
                else:
                    self.model.set_adapter(_OWN)
                    self.model.delete_adapter(_VISITING)

    def _unwrap(self) -> None:
        """Take peft off; the parameters beneath are the ones it was put on."""
        if isinstance(self.model, peft.PeftModel):
            self.model = self.model.unload()
            # peft leaves its mark, and would warn that the model is wrapped a second time.
            if hasattr(self.model, "peft_config"):
                del self.model.peft_config
            for weight in self._with_gradient:
                weight.requires_grad_(True)
        self._lora = None


def _plain_template(tokenizer: Any) -> str:
    """What a base model is asked in: it begins as the texts did that the model has learned from.

    Gemma and Llama had a token of their own there, which tokenizers put in front of a plain text,
    and templates say by themselves.
    """
    own = tokenizer.bos_token_id
    begun = own is not None and tokenizer("a").input_ids[0] == own
    return "{{ bos_token }}" * begun + DEFAULT_CHAT_TEMPLATE


def _read_model(source: Mapping[str, Any], device: torch.device) -> Any:
    """The model that a policy's ``source`` describes."""
    where, dtype = source["place"], getattr(torch, source["dtype"])
    if where.endswith(SUFFIX):  # takes long enough for its bar
        return read_gguf(Path(where), dtype).to(device)
    more: dict[str, Any] = {}
    if "quantization_config" in source:
        # It is quantized on its device, weight by weight, and some kinds cannot be moved later.
        more["quantization_config"] = quantization_of(source["quantization_config"])
        more["device_map"] = {"": device}
    # A bar for a second's work is noise, and so is the hint to install a CUDA kernel on a CPU.
    logging.getLogger("transformers.integrations.hub_kernels").addFilter(_no_kernel_hint)
    showed_bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        model = read_whole(
            where, dtype=dtype, trust_remote_code=source["trust_remote_code"], **more
        )
        return model if "device_map" in more else model.to(device)
    finally:
        if showed_bars:
            hf_logging.enable_progress_bar()


@torch.no_grad()
def _check_causal(model: Any) -> None:
    """Refuse encoders: transformers lets BERT and its kin write, though they look ahead.

    Raises:
        ModelError: What is behind a token changes what is said at it.
    """
    ids_22 = torch.tensor([[0, 1], [0, 2]], device=model.device)
    with as_current(model.device):
        output = model(input_ids=ids_22, attention_mask=torch.ones_like(ids_22), use_cache=False)
    one_V, other_V = output.logits[:, 0].float()
    if (one_V - other_V).norm() > LOOKS_AHEAD * (one_V - one_V.mean()).norm():
        raise ModelError(
            f"{type(model).__name__} looks ahead, as encoders do: it can fill gaps in a text, but "
            "not write one; take a model that writes, such as Qwen3 or SmolLM2"
        )


def _no_kernel_hint(record: logging.LogRecord) -> bool:
    return torch.cuda.is_available() or "reference PyTorch" not in record.getMessage()


def _context_length(config: Any, tokenizer: Any) -> int:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    limits = [n for n in (positions, tokenizer.model_max_length) if n and n < 10**9]
    return int(limits[0]) if limits else 2048


def adapter_shapes(model: Any, cfg: LoraConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's adapters, by the names of ``Policy.trainable_state``.

    No memory is taken for them. Not all have ``cfg.rank`` rows: the experts of a mixture are one
    weight, whose adapter has that many for each.

    Args:
        model: With adapters or without; may be on PyTorch's meta device.
    """
    model = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    with torch.device("meta"), torch.random.fork_rng([]):
        made = _wrap(type(model)(model.config), cfg, _OWN)
    return {name: tuple(weight.shape) for name, weight in _adapter(made, _OWN).items()}


def _peft_config(model: Any, cfg: LoraConfig) -> peft.LoraConfig:
    # The kernels of Mamba's mixers, which alone have a weight D, read that of their last layer past
    # an adapter; where peft knows that a model has them, it refuses it.
    mixers = [name for name, module in model.named_modules() if "D" in module._parameters]
    return peft.LoraConfig(
        r=cfg.rank,
        lora_alpha=cfg.alpha,
        lora_dropout=cfg.dropout,
        target_modules="all-linear",
        exclude_modules=[f"{name}.out_proj" for name in mixers] or None,
        task_type="CAUSAL_LM",
    )


def _wrap(model: Any, cfg: LoraConfig, name: str) -> Any:
    with warnings.catch_warnings():
        # peft 0.19 to 0.21 asks transformers for an attribute by its former name.
        warnings.simplefilter("ignore", FutureWarning)
        try:
            return peft.get_peft_model(model, _peft_config(model, cfg), name).eval()
        except (ValueError, NotImplementedError) as error:  # dropout on a mixture's experts, say
            raise ModelError(
                f"no adapters with {cfg} can be put on {type(model).__name__}: {error} Take other "
                "lora settings"
            ) from error


def _adapter(model: Any, name: str) -> dict[str, torch.nn.Parameter]:
    found = model.named_parameters()
    return {k.replace(f".{name}.", "."): v for k, v in found if f".{name}." in k}


@torch.no_grad()
def _fill(weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    wrong = sorted(set(weights) ^ set(state))
    wrong += [k for k in weights if k in state and weights[k].shape != state[k].shape]
    if wrong:
        raise ModelError(f"these weights are of another model or other adapters: {wrong[:3]}")
    for name, weight in weights.items():
        weight.copy_(state[name])


@contextmanager
def _swapped(weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Iterator[None]:
    own = {name: weight.detach().clone() for name, weight in weights.items()}
    _fill(weights, state)
    try:
        yield
    finally:
        _fill(weights, own)


def _plain(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights, those that are made of several tensors (torchao's quantized) as these."""
    plain: dict[str, Tensor] = {}
    for name, weight in weights.items():
        parts: Sequence[str] = ()
        flatten = getattr(weight.detach(), "__tensor_flatten__", None)
        if flatten is not None:
            parts = flatten()[0]
        plain |= _plain({f"{name}.{part}": getattr(weight, part) for part in parts})
        if not parts:
            plain[name] = weight
    return plain


def _hash(weights: Mapping[str, Tensor], salt: str = "") -> str:
    digest, weights = hashlib.sha256(salt.encode()), _plain(weights)
    with ThreadPoolExecutor() as threads:
        for name in sorted(weights):
            weight = weights[name].detach().cpu().contiguous()
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            data = weight.reshape(-1).view(torch.uint8).numpy().data
            if len(data) <= HASHED_TOGETHER:
                digest.update(data)
                continue
            starts = range(0, len(data), HASHED_TOGETHER)
            parts = [data[start : start + HASHED_TOGETHER] for start in starts]
            for part in threads.map(hashlib.sha256, parts):
                digest.update(part.digest())
    return digest.hexdigest()
