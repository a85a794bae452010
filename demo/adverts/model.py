"""The parts of the model, and the folder they are written to."""

import shutil
from pathlib import Path

from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

CHECKPOINT = Path(__file__).parent / "checkpoint"
IMAGE_SIDE, PATCH = 96, 12
IMAGE_TOKENS = (IMAGE_SIDE // PATCH) ** 2
VOCABULARY = 1400
SHARD = "2MB"


def build_processor(tokenizer: LlamaTokenizer) -> LlavaProcessor:
    """CLIP's image preprocessing and `tokenizer`, combined as in LLaVA 1.5."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIDE}, crop_size={"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def build_model(tokenizer: LlamaTokenizer) -> LlavaForConditionalGeneration:
    """An untrained model of LLaVA 1.5's form. As in LLaVA, the tower's last layer is not used."""
    vision = CLIPVisionConfig(
        image_size=IMAGE_SIDE,
        patch_size=PATCH,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=2,
        projection_dim=128,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=3,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.image_token_id,
        image_seq_length=IMAGE_TOKENS,
    )
    return LlavaForConditionalGeneration(config)


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path = CHECKPOINT) -> None:
    """Empty `folder`, then write the processor and the checkpoint to it, in half precision and in shards."""
    shutil.rmtree(folder, ignore_errors=True)
    model.half().save_pretrained(folder, max_shard_size=SHARD)
    processor.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)
