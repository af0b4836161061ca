"""The federation of a checkpoint, built again to be measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pfedmoe_mpi.checkpoint import Checkpoint
from pfedmoe_mpi.errors import CheckpointError
from pfedmoe_mpi.mpi.comm import Comm
from pfedmoe_mpi.run.restart import override_settings

if TYPE_CHECKING:  # it imports torch, which is imported only after the arguments were checked
    from pfedmoe_mpi.federation.loop import Loop


def evaluation_loop(
    world: Comm, loaded: Checkpoint, overrides: Mapping[str, Any], protected: bool = True
) -> Loop:
    """Return a loop over a verified checkpoint's federation, to measure and not to train; collective.

    Args:
        protected: False leaves the settings of privacy out, which no measurement needs: neither the packages
            of the extra `privacy` nor trial steps.

    Raises:
        UserError: on all ranks: the data are missing, or the checkpoint's models cannot take them.
    """
    from pfedmoe_mpi.federation import own_code
    from pfedmoe_mpi.federation.build import build
    from pfedmoe_mpi.federation.loop import Loop, SilentObserver

    settings, _ = world.attempt(
        lambda: override_settings(loaded.config, overrides, ("server.optimiser",)), "settings"
    )
    if not protected:
        settings = settings.model_copy(update={"privacy": settings.privacy.unprotected})
    federation = build(world, settings, loaded=loaded)
    own_code.check_unchanged(world, settings, federation.code, loaded)
    loaded_layouts = [loaded.state_layout, *map(loaded.layout, range(loaded.clients))]
    built_layouts = [federation.state_layout, *federation.client_layouts]
    if [layout.digest for layout in loaded_layouts] != [layout.digest for layout in built_layouts]:
        raise CheckpointError(
            f"the checkpoint's models do not take samples of {'×'.join(map(str, federation.task.shape))} in "
            f"{federation.task.classes} classes",
            "set --data.path to data with the shape and the classes that it was trained on",
        )
    if federation.task.vocabulary and federation.data_digest != loaded.identity["data_digest"]:
        raise CheckpointError(
            "these are not the texts of the training, and a model knows only the tokens of its training rows",
            "set --data.path to the data that it was trained on",
        )
    loop = Loop(world, federation, SilentObserver(), None)
    loop.resume(loaded)
    return loop
