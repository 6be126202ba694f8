"""Found by ``optimum-cli`` at every start: a failure here would break all of its commands, so none is let through."""

import warnings

REGISTER_COMMANDS = []
try:
    from qcbguard_plugins.cli.optimum import commands

    REGISTER_COMMANDS = commands()
except ImportError:  # an Optimum without the classes that the commands stand on
    pass
except Exception as error:  # the user came for another command
    warnings.warn(f"the commands of qcbguard are not available: {error}", stacklevel=1)
