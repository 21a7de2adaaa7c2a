"""Train the digits network and write weights.safetensors, eval.npz and calibration.npz beside this file.

Needs scikit-learn: pip install "edgeship[train]". One CPU core, under a minute.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from model import DigitsCNN
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

FOLDER = Path(__file__).parent
SEED = 20261122
EPOCHS = 40
BATCH = 64
# Mean and deviation of the training pixels divided by the largest value, 16; sample.toml tells them to the app.
MEAN, STD = 0.305, 0.376


def main() -> None:
    """Train, print the test accuracy, write the three files."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    digits = load_digits()
    images = ((digits.images / 16.0 - MEAN) / STD).astype(np.float32)[:, None]
    labels = digits.target.astype(np.int64)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=0.3, stratify=labels, random_state=SEED
    )
    network = DigitsCNN()
    fit(network, torch.from_numpy(train_x), torch.from_numpy(train_y))
    with torch.no_grad():
        accuracy = float((network(torch.from_numpy(test_x)).argmax(1).numpy() == test_y).mean())
    print(f"test accuracy {accuracy:.4f} on {len(test_y)} images the training never saw")
    save_file(network.state_dict(), FOLDER / "weights.safetensors")
    np.savez_compressed(FOLDER / "eval.npz", image=test_x, label=test_y)
    np.savez_compressed(FOLDER / "calibration.npz", image=train_x[:128])


def fit(network: DigitsCNN, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Adam with a one-cycle rate; every image is moved by up to one pixel each time it is seen."""
    steps = EPOCHS * -(-len(images) // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
    background = images.min()
    network.train()
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images)).split(BATCH):
            loss = torch.nn.functional.cross_entropy(
                network(shifted(images[rows], background)), labels[rows], label_smoothing=0.05
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()


def shifted(images: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
    """Each image moved by -1, 0 or 1 pixel along both axes, (N, 1, 8, 8)."""
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), value=float(background))
    windows = padded.unfold(2, 8, 1).unfold(3, 8, 1)
    rows, columns = torch.randint(0, 3, (2, len(images)))
    return windows[torch.arange(len(images)), :, rows, columns]


if __name__ == "__main__":
    main()
