"""Names that nobody looks for do not take room in the file."""

from edgeship.lowering.litert.flatbuffer import parse


def test_call_stacks_are_not_in_the_file_and_weights_keep_their_names(layers_program, lower_to_tflite):
    artifact = lower_to_tflite(layers_program)
    model = parse(artifact.path.read_bytes())
    names = [bytes(tensor.name or b"").decode() for graph in model.subgraphs for tensor in graph.tensors]
    assert {placement.stored for placement in artifact.placements} <= set(names)
    specs = (*artifact.signature.inputs, *artifact.signature.outputs)
    assert {spec.name for spec in specs} <= set(names)
    assert not [name for name in names if "/" in name or ";" in name]
    assert len([name for name in names if name.startswith("t") and name[1:].isdigit()]) > 1
