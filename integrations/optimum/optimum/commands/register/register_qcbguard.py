"""Found by ``optimum-cli`` at every start: a failure here would break all of its commands, so none is let through."""

REGISTER_COMMANDS = []
try:
    from qcbguard_plugins.backends.optimum.commands import commands

    REGISTER_COMMANDS = commands()
except ImportError:  # an Optimum without the classes that the commands stand on
    pass
