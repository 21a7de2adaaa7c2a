"""The passes that a user may set options of, under short names: ``passes=[Quantize(bits=4), Verify(samples=64)]``."""

from edgeship.core.settings import settings_of
from edgeship.passes.check.accuracy import CheckAccuracy
from edgeship.passes.check.layers import CheckLayers
from edgeship.passes.check.size import CheckSize
from edgeship.passes.check.verify import VerifyArtifact
from edgeship.passes.compress.allocate import AllocateBits
from edgeship.passes.compress.calibrate import CalibrateActivations
from edgeship.passes.compress.finetune import FinetuneWeights
from edgeship.passes.compress.prune import PruneWeights
from edgeship.passes.compress.quantize import QuantizeWeights
from edgeship.passes.compress.sensitivity import MeasureSensitivity
from edgeship.passes.compress.smooth import SmoothScales
from edgeship.passes.ship.benchmark import Benchmark as BenchmarkArtifact

Allocate = settings_of(AllocateBits)
Calibrate = settings_of(CalibrateActivations)
Finetune = settings_of(FinetuneWeights)
Prune = settings_of(PruneWeights)
Quantize = settings_of(QuantizeWeights)
Sensitivity = settings_of(MeasureSensitivity)
Smooth = settings_of(SmoothScales)

Accuracy = settings_of(CheckAccuracy)
Layers = settings_of(CheckLayers)
Size = settings_of(CheckSize)
Verify = settings_of(VerifyArtifact)

Benchmark = settings_of(BenchmarkArtifact)
