"""An adapter, and the model under it, as Hugging Face's transformers has them: ``SamModel`` with PEFT on it.

transformers rewrote segment_anything under other names. Its answers are the same, if its decoder's norms have
segment_anything's epsilon, as those written here have, and if prompts are given as SAM wants them: half a pixel of the
resized image less than continuous pixels have it (:mod:`wesam.prompts`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file
from segment_anything.modeling import ImageEncoderViT, Sam

from wesam.adapters import WEIGHTS_FILE, AdaptedSam, is_adapter
from wesam.errors import InputError
from wesam.sam import kind_of
from wesam.sam.checkpoints import write_tensors

if TYPE_CHECKING:
    from transformers import SamConfig

HUB = {"vit_b": "facebook/sam-vit-base", "vit_l": "facebook/sam-vit-large", "vit_h": "facebook/sam-vit-huge"}
"""Where the published models are on Hugging Face's hub."""

BASE = "base"
"""The folder, within the adapter's, of a model that the hub does not have."""

_PREFIX = "base_model.model."
_RENAMED = {
    r"^image_encoder\.": "vision_encoder.",
    r"\.blocks\.": ".layers.",
    r"patch_embed\.proj(\.|$)": r"patch_embed.projection\1",
    r"neck\.0": "neck.conv1",
    r"neck\.1": "neck.layer_norm1",
    r"neck\.2": "neck.conv2",
    r"neck\.3": "neck.layer_norm2",
    r"\.norm": ".layer_norm",
    r"(hypernetworks_mlps\.\d+|prediction_head)\.layers\.0": r"\1.proj_in",
    r"(hypernetworks_mlps\.\d+|prediction_head)\.layers\.1": r"\1.layers.0",
    r"(hypernetworks_mlps\.\d+|prediction_head)\.layers\.2": r"\1.proj_out",
    r"output_upscaling\.0": "upscale_conv1",
    r"output_upscaling\.1": "upscale_layer_norm",
    r"output_upscaling\.3": "upscale_conv2",
    r"mask_downscaling\.0": "mask_embed.conv1",
    r"mask_downscaling\.1": "mask_embed.layer_norm1",
    r"mask_downscaling\.3": "mask_embed.conv2",
    r"mask_downscaling\.4": "mask_embed.layer_norm2",
    r"mask_downscaling\.6": "mask_embed.conv3",
    r"point_embeddings": "point_embed",
    r"pe_layer\.positional_encoding_gaussian_matrix": "shared_embedding.positional_embedding",
}
"""What of a name of segment_anything's is called otherwise in transformers, in the order in which it is replaced."""


def renamed(name: str) -> str:
    """The name in transformers' SamModel of a module or tensor of segment_anything's Sam."""
    for pattern, new in _RENAMED.items():
        name = re.sub(pattern, new, name)
    return name


def export_peft(sam: Sam, adapter: Path, out: Path, *, base: bool = False) -> str:
    """Writes an adapter so that ``peft.PeftModel.from_pretrained(SamModel.from_pretrained(model), out)`` loads it.

    sam: the model that it is for. base: write the model itself, too, as is always done with one that the hub does not
    have. Returns the ``model`` to load it on: a name on the hub, or the folder written. Raises InputError for an
    adapter that does not fit, for models that transformers does not have, and for a folder that cannot be written or
    holds an adapter as wesam itself has it.
    """
    import peft

    if is_adapter(out):
        raise InputError(f"{out} holds an adapter of wesam's, which would be overwritten: give another folder")
    if (train := AdaptedSam.load(sam, adapter).train) != "lora":
        raise InputError(f"this adapter holds more than LoRA matrices (train is {train}): use --merge")
    _convertible(sam)
    config = peft.LoraConfig.from_pretrained(str(adapter))
    state = {_in_peft(k): v for k, v in load_file(adapter / WEIGHTS_FILE).items()}
    hub = HUB.get(str(getattr(sam, "name_or_path", "")))
    model = str(out / BASE) if base or hub is None else hub
    config.base_model_name_or_path = model
    config.target_modules = sorted({k.removeprefix(_PREFIX).partition(".lora_")[0] for k in state})
    try:
        out.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(str(out))
        write_tensors(state, out / WEIGHTS_FILE)
        if model != hub:
            write_base(sam, out / BASE)
    except OSError as e:
        raise InputError(f"cannot write to {out}: {e.strerror or e}") from None
    return model


def write_base(sam: Sam, out: Path) -> None:
    """Writes a SAM, and what prepares its images, as ``SamModel`` and ``SamProcessor`` load them from the folder."""
    _convertible(sam)
    from transformers import SamImageProcessor, SamModel, SamProcessor
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = SamModel(transformers_config(sam))
    state = {renamed(k): v.detach().cpu() for k, v in sam.state_dict().items()}
    positions = state["prompt_encoder.shared_embedding.positional_embedding"]
    model.load_state_dict({**state, "shared_image_embedding.positional_embedding": positions})
    model.save_pretrained(out)
    for file in out.glob("*.safetensors"):
        file.chmod((out / "config.json").stat().st_mode)  # as write_tensors has it
    side, grid = sam.image_encoder.img_size, 4 * sam.prompt_encoder.image_embedding_size[0]
    images = SamImageProcessor(
        size={"longest_edge": side}, pad_size={"height": side, "width": side},
        mask_size={"longest_edge": grid}, mask_pad_size={"height": grid, "width": grid},
        image_mean=(sam.pixel_mean.flatten() / 255).tolist(), image_std=(sam.pixel_std.flatten() / 255).tolist(),
    )  # fmt: skip
    SamProcessor(images).save_pretrained(out)


def transformers_config(sam: Sam) -> SamConfig:
    """The configuration of the SamModel that has this SAM's shape."""
    from transformers import SamConfig, SamMaskDecoderConfig, SamPromptEncoderConfig, SamVisionConfig

    encoder, prompts, decoder = sam.image_encoder, sam.prompt_encoder, sam.mask_decoder
    block = encoder.blocks[0]
    side, patch = encoder.img_size, encoder.patch_embed.proj.kernel_size[0]
    windows = [b.window_size for b in encoder.blocks]
    layer = decoder.transformer.layers[0]
    return SamConfig(
        vision_config=SamVisionConfig(
            hidden_size=encoder.pos_embed.shape[-1], output_channels=encoder.neck[0].out_channels,
            num_hidden_layers=len(windows), num_attention_heads=block.attn.num_heads, image_size=side, patch_size=patch,
            layer_norm_eps=block.norm1.eps, qkv_bias=block.attn.qkv.bias is not None,
            use_rel_pos=block.attn.use_rel_pos, window_size=max(windows),
            global_attn_indexes=[i for i, w in enumerate(windows) if w == 0],
            num_pos_feats=prompts.embed_dim // 2, mlp_dim=block.mlp.lin1.out_features,
        ).to_dict(),
        prompt_encoder_config=SamPromptEncoderConfig(
            hidden_size=prompts.embed_dim, image_size=side, patch_size=patch,
            mask_input_channels=prompts.mask_downscaling[3].out_channels,
        ).to_dict(),
        mask_decoder_config=SamMaskDecoderConfig(
            hidden_size=decoder.transformer_dim, mlp_dim=layer.mlp.lin1.out_features,
            num_hidden_layers=len(decoder.transformer.layers), num_attention_heads=layer.self_attn.num_heads,
            attention_downsample_rate=decoder.transformer_dim // layer.cross_attn_token_to_image.internal_dim,
            num_multimask_outputs=decoder.num_multimask_outputs,
            iou_head_depth=decoder.iou_prediction_head.num_layers,
            iou_head_hidden_dim=decoder.iou_prediction_head.layers[0].out_features, layer_norm_eps=layer.norm1.eps,
        ).to_dict(),
    )  # fmt: skip


def _in_peft(key: str) -> str:
    """The name in an adapter of transformers' of a tensor in one of segment_anything's."""
    return _PREFIX + renamed(key.removeprefix(_PREFIX))


def _convertible(sam: Sam) -> None:
    if not isinstance(sam.image_encoder, ImageEncoderViT):
        name = kind_of(sam) or "this model"
        raise InputError(f"transformers has no {name}: only models with SAM's own encoder can be exported for it")
