"""The command `verify`: `replayable` says which rounds, `command` replays, `card` prints what was found."""
