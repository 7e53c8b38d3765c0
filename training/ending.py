"""How a script ends: what the user did wrong in one message, and a status that says which kind of end it was."""

import os
import signal
import sys
from collections.abc import Callable

from data.errors import DataError
from training.distributed import local_rank, rank, words, world_size
from training.errors import LOST, STOPPED, NodeError, RankError, Stopped, UserError

GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "remote process")


def lost(error: RuntimeError) -> bool:
    """Whether a collective failed because a rank went away, which has an error of its own to tell."""
    return world_size() > 1 and any(words in str(error) for words in GONE)


def run(main: Callable[[], None]) -> None:
    """Run a script: what the user did wrong is told in one message, and every rank ends with status 2."""
    me, status, message = rank(), 2, None
    try:
        main()
        status = 0
    except UserError as error:  # every rank has it: from the settings, which all read, or from `together`
        tells = isinstance(error, RankError) or (local_rank() if isinstance(error, NodeError) else me) == 0
        message = words(error) if tells else None
    except (DataError, OSError) as error:  # this rank's own: the launcher ends the others
        message = words(error) if world_size() == 1 else f"rank {me}: {words(error)}"
    except Stopped as reason:
        status = STOPPED
        if me == 0:
            print(reason)
    except RuntimeError as error:
        if not lost(error):
            raise
        status = LOST
        if local_rank() == 0:
            message = f"rank {me} lost another rank: {str(error).splitlines()[0].partition(' This is ')[0]}"
    except KeyboardInterrupt:  # end by the signal, as a shell expects, and without a traceback of every rank
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    if message:
        print(f"error: {message}", file=sys.stderr)
    if world_size() > 1:  # a process group that ends with the interpreter aborts now and then, and may wait for others
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
