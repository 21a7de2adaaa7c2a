"""Write a ``.litertlm``: a header that says where the sections lie, then the sections, each on a block of its own.

The header's schema is litert-lm-builder's. Its writer puts the time and a random number into every file; here the same
model gives the same bytes, and a section is written where it stays.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from edgeship.llm.chat import ChatTemplate
from edgeship.lowering.chat_template import litert_template

if TYPE_CHECKING:
    from edgeship.core.decoder import Decoder

Kind = Literal["LlmMetadataProto", "HF_Tokenizer_Zlib", "TFLiteModel"]
# How the container calls a model with prefill and decode signatures.
PREFILL_DECODE = "tf_lite_prefill_decode"


@dataclass(frozen=True)
class Section:
    """One section.

    Args:
        write: writes the content at the file's position. items: what the header says of it.
    """

    kind: Kind
    write: Callable[[BinaryIO], object]
    items: dict[str, str] = field(default_factory=dict)


def write_container(path: Path, sections: Sequence[Section]) -> None:
    """Write the file. Each section's content is made when its turn comes."""
    import flatbuffers

    from edgeship.compat.litert import section_reader, section_schema

    core, schema = section_reader(), section_schema()
    # Zero fields are left out of a flatbuffer, so the header only has its final length with others.
    objects = [
        schema.SectionObjectT(
            items=_items(section),
            dataType=getattr(schema.AnySectionDataType, section.kind),
            beginOffset=1,
            endOffset=1,
        )
        for section in sections
    ]
    header = schema.LiteRTLMMetaDataT(
        systemMetadata=schema.SystemMetadataT(entries=[_item("Authors", "edgeship")]),
        sectionMetadata=schema.SectionMetadataT(objects=objects),
    )

    def packed() -> bytes:
        builder = flatbuffers.Builder(1024)
        builder.Finish(header.Pack(builder))
        return bytes(builder.Output())

    length = len(packed())
    with path.open("wb") as file:
        position = core.HEADER_BEGIN_BYTE_OFFSET + length
        for section, entry in zip(sections, objects, strict=True):
            position = -(-position // core.BLOCK_SIZE) * core.BLOCK_SIZE
            file.seek(position)
            entry.beginOffset = position
            section.write(file)
            position = entry.endOffset = file.tell()
        version = (core.LITERTLM_MAJOR_VERSION, core.LITERTLM_MINOR_VERSION, core.LITERTLM_PATCH_VERSION)
        file.seek(0)
        file.write(core.HEADER_MAGIC_BYTES + b"".join(number.to_bytes(4, "little") for number in version))
        file.seek(core.HEADER_END_LOCATION_BYTE_OFFSET)
        file.write((core.HEADER_BEGIN_BYTE_OFFSET + length).to_bytes(8, "little") + packed())


def _items(section: Section) -> list[Any]:
    """What the header says of a section, beside where it lies."""
    return [_item(key, value) for key, value in section.items.items()]


def _item(key: str, value: str) -> Any:
    from edgeship.compat.litert import section_schema

    schema = section_schema()
    text = schema.StringValueT(value=value)
    return schema.KeyValuePairT(key=key, valueType=schema.VData.StringValue, value=text)


def tokenizer_section(tokenizer: Path) -> Section:
    """A Hugging Face ``tokenizer.json``: its length, then the file, compressed."""
    content = tokenizer.read_bytes()
    packed = len(content).to_bytes(8, "little") + zlib.compress(content)
    return Section("HF_Tokenizer_Zlib", lambda file: file.write(packed))


def metadata_section(decoder: Decoder, origin: Path, context: int) -> Section:
    """What the engine must know of the model: context, the tokens that start and end a text, the chat template.

    Args:
        origin: folder with the files of `Decoder.files`.
    """
    from edgeship.compat.litert import metadata_proto, sampler_proto

    found = metadata_proto().LlmMetadata(
        max_num_tokens=context, supports_thinking=False, supports_function_calling=False
    )
    found.llm_model_type.generic_model.SetInParent()
    # The engine refuses a model that never stops; an id behind the vocabulary is never drawn.
    for token in decoder.eos or (decoder.vocabulary,):
        found.stop_tokens.add().token_ids.ids.append(token)
    start = decoder.bos is not None and _prepends(origin / "tokenizer.json", decoder.bos)
    template = ChatTemplate.read(origin)
    if template is not None:
        bos = next((text for text, token in template.added.items() if token == decoder.bos), "")
        # The engine begins every text with this token, a conversation too. A template that does so itself leaves it to
        # the engine, and where conversations have none the engine is told of none.
        start = start and template.begins_with(bos)
        found.jinja_prompt_template = litert_template(template, bos if start else "")
    if start and decoder.bos is not None:
        found.start_token.token_ids.ids.append(decoder.bos)
    sampler = found.sampler_params
    # Type GREEDY is not implemented on CPU; the likeliest of one is the same.
    sampler.type = sampler_proto().SamplerParameters.TOP_P
    sampler.k, sampler.p, sampler.temperature, sampler.seed = 1, 1.0, 1.0, 0
    content = found.SerializeToString(deterministic=True)
    return Section("LlmMetadataProto", lambda file: file.write(content))


def _prepends(tokenizer: Path, token: int) -> bool:
    """Whether the tokenizer begins every text with ``token``; the engine's own does not."""
    from tokenizers import Tokenizer

    whole = Tokenizer.from_file(str(tokenizer))
    return (
        [int(item) for item in whole.encode("a").ids[:1]]
        == [token]
        != whole.encode("a", add_special_tokens=False).ids[:1]
    )
