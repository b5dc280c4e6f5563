"""Complete the settings of a run with --initial-net by those of the net that it starts from."""

from trainer.run import Run
from trainer.setting_groups import Net
from trainer.settings import Settings, validated


def with_initial_net(settings: Settings) -> Settings:
    """Return the settings; with --initial-net, those of the net that are not given come from another run.

    That is the run of --initial-weights or, once this run has begun, the run itself. Raises SettingsError if
    they do not suit each other, and as `Run.recorded_settings` and `Run.net` do.
    """
    if not settings.initial_net or settings.initial_weights is None:
        return settings
    own = Run(settings.run_folder)
    source = own if own.begun else Run(settings.initial_weights)
    theirs = source.settings()
    chosen = {name: getattr(theirs, name) for name in Net.model_fields}
    chosen["pixel_mean"] = source.net(theirs).mean
    given = settings.model_dump(exclude_unset=True)
    # Without initial_net, the net is known, and all settings are compared with it.
    complete = validated(chosen | given | {"initial_net": False})
    return complete.model_copy(update={"initial_net": True})
