"""What edgeship needs of LiteRT's packages that they do not document: an upgrade that breaks it is red here and says
what."""

from __future__ import annotations

import logging
import threading

import pytest
import torch

litert_torch = pytest.importorskip("litert_torch")

from edgeship.compat import litert as compat  # noqa: E402


def test_the_operators_of_the_format() -> None:
    values, places = compat.tfl_operators().topk_v2(torch.tensor([3.0, 9.0, 5.0]), 2)
    assert values.tolist() == [9, 5]
    assert places.tolist() == [1, 2]


class Step(torch.nn.Module):
    def forward(self, cache, rows, place, left, right):
        zero = torch.zeros((), dtype=torch.int32)
        written = compat.write_slice(cache, rows, [zero, zero, place, zero])
        return written, compat.product_of_rows(left, right)


def example() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    shapes = (1, 2, 5, 3), (1, 2, 1, 3), None, (1, 2, 4, 3), (1, 2, 6, 3)
    return tuple(torch.tensor(2, dtype=torch.int32) if shape is None else torch.randn(shape) for shape in shapes)


def test_a_cache_is_written_and_rows_are_multiplied() -> None:
    cache, rows, place, left, right = example()
    written, product = Step()(cache, rows, place, left, right)
    assert torch.equal(written[:, :, 2:3], rows)
    assert torch.equal(written[:, :, :2], cache[:, :, :2])
    assert torch.allclose(product, left @ right.transpose(2, 3), atol=1e-6)


def names(module) -> list[str]:
    found = []

    def walk(operation) -> None:
        for region in operation.regions:
            for block in region:
                for inner in block:
                    found.append(inner.operation.name)
                    walk(inner.operation)

    walk(module.operation)
    return found


def test_what_is_lowered_may_be_changed_and_the_converter_is_left_as_it_was() -> None:
    from litert_torch import fx_infra
    from litert_torch.backend import export

    plain, silence, seen = export.exported_program_to_mlir, fx_infra.silence_torch_logs, []
    ir, stablehlo = compat.mlir(), compat.stablehlo()

    def touch(module) -> None:
        seen.extend(names(module))
        for function in module.body.operations:
            if "sym_name" in function.attributes:
                assert ir.StringAttr(function.attributes["sym_name"]).value
        assert callable(stablehlo.OptimizationBarrierOp)

    def convert() -> bytes:
        return litert_torch.Converter().signature("serve", Step().eval(), example()).convert().model_content()

    log = logging.getLogger("torch._dynamo")
    before, handler = (log.level, log.propagate), logging.NullHandler()
    log.addHandler(handler)
    with compat.converting(touch):
        assert convert()[4:8] == b"TFL3"
        thread = threading.Thread(target=lambda: export.exported_program_to_mlir is plain or seen.append("patched"))
        thread.start()
        thread.join()
    assert {"stablehlo.dynamic_update_slice", "stablehlo.dot_general"} & set(seen)
    assert export.exported_program_to_mlir is plain
    assert (log.level, log.propagate) == before
    assert handler in log.handlers
    log.removeHandler(handler)
    with pytest.raises(ZeroDivisionError), compat.converting(touch):
        raise ZeroDivisionError
    assert callable(fx_infra.silence_torch_logs)
    assert fx_infra.silence_torch_logs is silence
    assert export.exported_program_to_mlir is plain


def test_what_other_threads_lower_is_not_touched() -> None:
    from litert_torch.backend import export

    class Lowered:
        module = "module"

    touched = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "exported_program_to_mlir", Lowered)
        with compat.converting(touched.append):
            export.exported_program_to_mlir()
            thread = threading.Thread(target=export.exported_program_to_mlir)
            thread.start()
            thread.join()
    assert touched == ["module"]


def test_the_sections_of_a_language_model() -> None:
    reader, schema = compat.section_reader(), compat.section_schema()
    assert len(reader.HEADER_MAGIC_BYTES) == 8
    assert (reader.LITERTLM_MAJOR_VERSION, reader.LITERTLM_MINOR_VERSION, reader.LITERTLM_PATCH_VERSION) >= (1, 0, 0)
    assert 0 < reader.HEADER_END_LOCATION_BYTE_OFFSET < reader.HEADER_BEGIN_BYTE_OFFSET < reader.BLOCK_SIZE
    for kind in ("HF_Tokenizer_Zlib", "LlmMetadataProto", "TFLiteModel", "TFLiteWeights"):
        assert isinstance(getattr(schema.AnySectionDataType, kind), int)
    import flatbuffers

    text = schema.StringValueT(value="edgeship")
    item = schema.KeyValuePairT(key="Authors", valueType=schema.VData.StringValue, value=text)
    section = schema.SectionObjectT(items=[item], dataType=1, beginOffset=16, endOffset=32)
    header = schema.LiteRTLMMetaDataT(
        systemMetadata=schema.SystemMetadataT(entries=[item]),
        sectionMetadata=schema.SectionMetadataT(objects=[section]),
    )
    builder = flatbuffers.Builder(64)
    builder.Finish(header.Pack(builder))
    sections = schema.LiteRTLMMetaData.GetRootAs(bytes(builder.Output()), 0).SectionMetadata()
    assert sections.ObjectsLength() == 1
    assert (sections.Objects(0).BeginOffset(), sections.Objects(0).EndOffset()) == (16, 32)


def test_the_metadata_of_a_language_model() -> None:
    proto = compat.metadata_proto()
    made = proto.LlmMetadata(max_num_tokens=7, supports_thinking=False, supports_function_calling=False)
    made.llm_model_type.generic_model.SetInParent()
    made.stop_tokens.add().token_ids.ids.append(3)
    made.start_token.token_ids.ids.append(1)
    made.jinja_prompt_template = "{{ messages }}"
    made.sampler_params.type = compat.sampler_proto().SamplerParameters.TOP_P
    made.sampler_params.k = 1
    again = proto.LlmMetadata()
    again.ParseFromString(made.SerializeToString(deterministic=True))
    assert again == made
