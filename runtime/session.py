"""InferenceSession: from a module of graphs, or an artifact on disk, to models that can be called."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import CacheError, ConfigError, RequestError
from ..cache import mef
from ..cache.config import CacheConfig
from ..cache.exported import export_to, find_precompiled
from ..cache.key import Key, make_key, toolchain
from ..cache.trust import Trust
from ..compiler import Graph, Module, Target, TensorType, compat, native, xla
from ..compiler.dump import Dump, dump_folder
from ..compiler.weights import Weight, WeightTable
from .ladder import runs_here
from .model import Executables, GraphSpec, Model, State, TensorSpec
from .weight_binding import bind

if TYPE_CHECKING:
    from ..compiler.artifact import Compilation

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelMetadata:
    """One graph of a compiled artifact, before anything of it is loaded."""

    name: str
    input_metadata: list[TensorSpec]
    output_metadata: list[TensorSpec]


class CompiledModels:
    """A compile artifact: MEF bytes and the graphs in them. Not executable; `InferenceSession.init_all` makes it so."""

    def __init__(self, artifact: mef.Mef) -> None:
        self.artifact = artifact
        manifest = artifact.json(mef.MANIFEST)
        self.target: str = manifest["target"]
        self.facts: dict[str, Any] = manifest["facts"]
        self.graphs = {name: GraphSpec.from_json(name, row) for name, row in manifest["graphs"].items()}
        self._signatures = artifact.json(mef.SIGNATURES)
        self._metadata = [
            ModelMetadata(name, list(graph.inputs), list(graph.outputs)) for name, graph in self.graphs.items()
        ]

    def __len__(self) -> int:
        return len(self._metadata)

    def __iter__(self) -> Iterator[ModelMetadata]:
        return iter(self._metadata)

    def __getitem__(self, index: int) -> ModelMetadata:
        return self._metadata[index]

    @property
    def vocab_size(self) -> int:
        """Of a text pipeline."""
        return int(self.facts["vocab_size"])

    def device(self) -> Target:
        """What the code has to run on: the target it is for, and for CPUs this host, whatever level the code is for."""
        target = Target.parse(self.target)
        return Target.parse("cpu") if target.platform == "cpu" else target

    def weight_parts(self, name: str, array: np.ndarray) -> Iterator[np.ndarray]:
        """What each device has of a weight, in their order; a weight that the artifact does not describe is whole."""
        weight = self._weights.get(name)
        every = range(self.devices)
        return (array if weight is None else weight.part(array, device, self.devices) for device in every)

    @cached_property
    def _weights(self) -> dict[str, Weight]:
        return {weight.name: weight for weight in self.weight_table.weights}

    @cached_property
    def weight_table(self) -> WeightTable:
        """What the weights are made of; empty where the artifact does not say."""
        described = self.artifact.find(mef.WEIGHTS, "")
        return WeightTable.from_json(self.artifact.json(mef.WEIGHTS)) if described else WeightTable(())

    @property
    def devices(self) -> int:
        """How many devices execute the code together."""
        return int(self.artifact.json(mef.COMPAT).get("devices", 1))

    @property
    def libraries(self) -> list[str]:
        """What the code calls beside the packages of its platform."""
        return list(self.artifact.json(mef.COMPAT).get("libraries", ()))

    def export_mef(self, path: str | Path) -> None:
        """Writes the artifact, byte for byte as it is in the cache."""
        Path(path).write_bytes(self.artifact.content())

    def load_executable(self, name: str) -> xla.Executable:
        """Loads an executable after its hash has been compared; raises CacheError when it is damaged or not there."""
        section = self.artifact.find(mef.NATIVE, name, self.target)
        if section is None:
            raise CacheError(f"the artifact has no executable {name} for {self.target}", "It will be compiled anew.")
        results = [TensorType(row["dtype"], tuple(row["shape"])) for row in self._signatures[name]["results"]]
        return xla.load_executable(self.artifact.read(section), results)

    def check(self, host: Target) -> None:
        """Raises CacheError when the code cannot run on `host`: XLA would load it and crash."""
        compat.check(self.artifact.json(mef.COMPAT), host)
        library = native.library()
        wanted = {name for name in self.artifact.json(mef.CUSTOM_CALLS) if name in native.HANDLERS}
        if lacking := wanted - set(library.handlers() if library else ()):
            raise CacheError(
                f"the artifact calls kernels that are not here: {', '.join(sorted(lacking))}", native.how_to_get()
            )


class DebugSettings:
    """Settings for compiler engineers; `ir_output_dir` asks for a dump of every stage."""

    def __init__(self) -> None:
        self.ir_output_dir: str | Path | None = dump_folder()

    def dump(self) -> Dump:
        return Dump(None if self.ir_output_dir is None else Path(self.ir_output_dir))


class InferenceSession:
    """Compiles and loads models for one device."""

    def __init__(
        self,
        device: str = "cpu",
        *,
        export_mefs: str | Path | None = None,
        precompiled_mefs: str | Path | Sequence[str | Path] = (),
    ) -> None:
        """export_mefs: a folder that every compiled artifact is written to, with a manifest
        precompiled_mefs: such folders; modules are traced and taken from there, and nothing is compiled
        """
        self.target = Target.parse(device)
        self.debug = DebugSettings()
        named = [precompiled_mefs] if isinstance(precompiled_mefs, (str, Path)) else precompiled_mefs
        self.precompiled_mefs = tuple(Path(folder) for folder in named)
        self.export_mefs = None if export_mefs is None else Path(export_mefs)

    def compile(self, model: Module | Graph | str | Path) -> CompiledModels:
        """A module, graph or path to a MEF as a compile artifact.

        Raises CompileError, CacheError, ConfigError, and MissingArtifactError for what is not among `precompiled_mefs`.
        """
        if isinstance(model, (str, Path)):
            if not Path(model).is_file():
                raise ConfigError(f"there is no artifact at {model}", "Give the path of a .mef file.")
            return CompiledModels(mef.Mef.open(model))
        from ..compiler.artifact import Compilation, Options

        module = model.module if isinstance(model, Graph) else model
        compilation = Compilation(module, self.target, Options(dump=self.debug.dump()))
        if self.precompiled_mefs:
            artifact = self._precompiled(compilation)
        else:
            buffer = io.BytesIO()
            compilation.run(mef.MefWriter(buffer))
            artifact = mef.Mef.from_bytes(buffer.getvalue())
        if self.export_mefs is not None:
            export_to(self.export_mefs, self._key(compilation), artifact, None)
        return CompiledModels(artifact)

    def _precompiled(self, compilation: Compilation) -> mef.Mef:
        names = list(compilation.module.graphs)
        what = f"{'graph' if len(names) == 1 else 'graphs'} {', '.join(names)}"
        key = self._key(compilation)
        return find_precompiled(self.precompiled_mefs, key, Trust.of(CacheConfig()), runs_here(key.factors), what).mef

    def _key(self, compilation: Compilation) -> Key:
        """The exact key: of the traced module, not of what it was made from."""
        graphs = {
            name: [[each.name, each.role, str(each.type)] for each in graph.arguments]
            for name, graph in compilation.module.graphs.items()
        }
        return make_key(
            {
                "module": compilation.module.name,
                "graphs": graphs,
                "stablehlo": compilation.fingerprint(),
                "target": self.target.spec(),
                "toolchain": toolchain(self.target.xla_platform),
                "xla_flags": os.environ.get("XLA_FLAGS", ""),
            }
        )

    def init_all(
        self,
        compiled: CompiledModels,
        weights_registry: Mapping[str, np.ndarray] | None = None,
        executables: Executables | None = None,
        state: State | None = None,
    ) -> dict[str, Model]:
        """Makes every graph of an artifact callable; executables are loaded at their first call.

        weights_registry: arrays by weight name, shared and not copied when they start at a 64-byte boundary
        executables, state: the artifact's, where the caller has begun to load or allocate some
        """
        compiled.check(self.target)
        xla.start_client()
        specs = {spec.name: spec for graph in compiled.graphs.values() for spec in graph.weights}
        weights = bind(
            list(specs.values()),
            weights_registry or {},
            compiled.weight_table,
            compiled.weight_parts if compiled.devices > 1 else None,
        )
        executables, state = executables or Executables(compiled.load_executable), state or State()
        return {name: Model(graph, executables, weights, state) for name, graph in compiled.graphs.items()}

    def load_all(
        self, model: Module | Graph | str | Path, weights_registry: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, Model]:
        """Compiles or opens, then loads; models by graph name."""
        return self.init_all(self.compile(model), weights_registry)

    def load(self, model: Graph | str | Path, weights_registry: Mapping[str, np.ndarray] | None = None) -> Model:
        """`load_all` for an artifact of one graph; raises RequestError when there are more."""
        models = self.load_all(model, weights_registry)
        if len(models) != 1:
            raise RequestError(f"there are {len(models)} graphs: {', '.join(models)}", "Use load_all.")
        return next(iter(models.values()))
