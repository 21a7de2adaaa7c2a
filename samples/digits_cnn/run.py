"""Read a few digits with the LiteRT model of a bundle, as an app does: all it needs is in the manifest.

python samples/digits_cnn/run.py bundles/digits_cnn
"""

import json
import sys
from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import Interpreter


def main(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    artifact = next(item for item in manifest["artifacts"] if item["runtime"] == "tflite")
    spec = artifact["signature"]["inputs"][0]
    network = Interpreter(str(bundle / artifact["main"])).get_signature_runner()
    data = np.load(Path(__file__).parent / "eval.npz")
    for image, label in zip(data["image"][1::134], data["label"][1::134], strict=True):
        # The evaluation file is normalised already; take it back to the grey values that a camera gives.
        grey = np.round(255 * (image * spec["std"][0] + spec["mean"][0])).astype(np.uint8)
        pixels = (grey.astype(np.float32) / 255 - spec["mean"][0]) / spec["std"][0]
        logits = network(image=pixels.reshape(spec["shape"]).astype(np.float32))["logits"][0]
        print("\n".join("".join(" .:-=+*#%@"[value * 9 // 255] * 2 for value in row.astype(int)) for row in grey[0]))
        print(f"this is a {logits.argmax()} (labelled {label})\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
