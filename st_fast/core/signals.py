"""The one place that decides what a signal does to a command that the same command continues. Imports no torch.

Every signal of STOPPING asks to stop. Where there is nothing to save, it ends the work at once, with Stopped. Where
steps would be lost it sets a flag, on which all ranks act at the same step; drawing and scoring, which a resume makes
again, end at once even then. Further signals change nothing, however many. A signal whose disposition was inherited as
ignored (`nohup`) stays ignored.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, NoReturn

from st_fast.core.errors import EXIT_INTERRUPTED, Interrupted, RunFailed, Stopped

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import Tensor

    from st_fast.core.ranks import Ranks

STOPPING = (
    signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU
)  # fmt: skip
"""What clusters, terminals and limits on processor time ask with."""
PATIENCE = 8.0
"""Seconds after which a process ends itself that was to leave at once, but hangs in a call that no signal wakes."""
ENDING = (signal.SIGTERM, signal.SIGHUP)
"""What ends a command that saves nothing in between as SIGINT does, by an exception."""
AGAIN = 1.0
"""Seconds after which drawing is interrupted again, where library code has swallowed the first Stopped."""


class StopRequest:
    """Whether this process was asked to stop, and by which signal first. Called as a signal's handler."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.deferred = False
        """A signal only sets the flag: all ranks have to act on it at the same step."""
        self.unsaved = False
        """There are steps to save."""
        self.over = False
        """The process is leaving: signals change nothing."""
        self._interruptible = self._raised = False
        self._untold = threading.Lock()

    def __bool__(self) -> bool:
        return self.name is not None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.ask(signal.Signals(number).name)
        if not (self.over or self._raised) and (self._interruptible or not self.deferred):
            self._raised = True
            raise Stopped(self.name)

    def ask(self, name: str) -> None:
        """Sets the flag, and says at once on the first rank that there is something to save. From any thread."""
        self.name = self.name or name
        if self.deferred and not self.over and self._untold.acquire(blocking=False):
            say(f"{self.name}: saving, then leaving")

    def check(self) -> None:
        """Stopped if a signal has come."""
        if self.name is not None:
            raise Stopped(self.name)

    def leave(self) -> None:
        """From now on signals change nothing."""
        self.over = True

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Around work that is made again after a resume: a signal ends it with Stopped, whatever is to be saved."""
        self.check()
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = self._raised = False

    def attend(self, number: int, main: int) -> None:
        """After a signal, in a thread of its own: sees to it that the main thread acts on it. Returns when it has."""
        asked = time.monotonic()
        self.ask(signal.Signals(number).name)
        while not self.over:
            time.sleep(0.05)
            waited = time.monotonic() - asked
            if self.over or self.deferred:
                if not self.over and self._interruptible and waited > AGAIN:
                    self._raised, asked = False, time.monotonic()
                    signal.pthread_kill(main, number)
            elif waited > PATIENCE:
                leave_at_once(str(self.name))


class Ended(KeyboardInterrupt):
    """A signal of ENDING; its number is the argument."""


_request = StopRequest()
_blocks = 0
_before: dict[signal.Signals, object] = {}
_pipe: tuple[int, int] | None = None
_ending: list[signal.Signals] = []


def say(text: str) -> None:
    """A line on standard error from the first rank, at any moment: written past all buffers, or not if that blocked."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError, ValueError):
            if select.select([], [2], [], 0)[1]:
                os.write(2, f"st_fast: {text}\n".encode(errors="replace"))


def asked_to_stop() -> str | None:
    """The signal that has asked this process to stop; None if none has."""
    return _request.name


def pass_on(name: str) -> None:
    """Another rank was asked to stop by this signal, and so is this one, unless it was before. From any thread."""
    number = signal.Signals[name]
    if not _request and _pipe is not None and number in _before:
        signal.pthread_kill(threading.main_thread().ident or 0, number)


def pay_no_heed() -> None:
    """The command is done, and its exit code known: from now on signals change nothing."""
    _end_no_more()
    if _pipe is not None:
        _request.leave()
        for number in _before:  # as the interpreter ends it would give handlers of ours up for death by signal
            signal.signal(number, signal.SIG_IGN)


def left_at_once(name: str) -> str:
    """What to say of a process that had nothing to save; batch scripts look for the last words."""
    return f"{name}: nothing that was saved is lost; the same command continues"


def leave_at_once(name: str) -> NoReturn:
    """Ends a process that has nothing to save, with one line."""
    say(left_at_once(name))
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError, RuntimeError):  # closed, or none, or being written to
            stream.flush()
    os._exit(EXIT_INTERRUPTED)


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, Stopped):
        leave_at_once(str(error))
    sys.__excepthook__(kind, error, trace)


def fill_standard_descriptors() -> None:
    """Opens what a process was started without of its standard input, output and error (`>&-`), on /dev/null.

    The next file to be opened, such as the pipe of the signals, would take their place, and be printed to.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            if (opened := os.open(os.devnull, os.O_RDWR)) != number:
                os.dup2(opened, number)
                os.close(opened)


def catch_signals() -> None:
    """From now on to the process's end, STOPPING ask it to stop. Does nothing where that is so already."""
    fill_standard_descriptors()
    sys.excepthook = _hook
    _catch()


def end_on_signals() -> None:
    """From now on ENDING raise Ended, once, unless they are ignored or somebody has a handler for them already."""
    if threading.current_thread() is threading.main_thread():
        for number in ENDING:
            if signal.getsignal(number) is signal.SIG_DFL:
                _ending.append(number)
                signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    for each in _ending:  # a second one must not interrupt the tidying up after the first
        signal.signal(each, signal.SIG_IGN)
    _ending.clear()
    raise Ended(number)


def _end_no_more() -> None:
    """Undoes `end_on_signals`, unless a signal has come."""
    for number in _ending:
        signal.signal(number, signal.SIG_DFL)
    _ending.clear()


def _catch() -> None:
    global _pipe
    if _pipe is not None:
        return
    _pipe = os.pipe()
    for end in _pipe:
        os.set_blocking(end, end == _pipe[0])
    # Even where the main thread hangs in a call, the interpreter writes the signal's number into the pipe.
    signal.set_wakeup_fd(_pipe[1], warn_on_full_buffer=False)
    arguments = (_pipe[0], threading.main_thread().ident, _request)
    threading.Thread(target=_listen, args=arguments, name="st_fast-signals", daemon=True).start()
    for number in STOPPING:
        handler = signal.getsignal(number)
        if handler is not signal.SIG_IGN:
            _before[number] = signal.SIG_DFL if handler is None else handler
            signal.signal(number, _request)


def _let_go() -> None:
    """Undoes `_catch`."""
    global _pipe
    if _pipe is None:
        return
    for number, handler in _before.items():
        signal.signal(number, handler)  # type: ignore[arg-type]
    _before.clear()
    signal.set_wakeup_fd(-1)
    os.close(_pipe[1])  # the thread reads its end, closes the other one and is over
    _pipe = None


def _listen(pipe: int, main: int, request: StopRequest) -> None:
    while got := os.read(pipe, 1):
        if got[0] in STOPPING and not request.over:
            request.attend(got[0], main)
    os.close(pipe)


def _in_child() -> None:
    """A forked child that runs on is not the run: it may be terminated, and what asks the run to stop passes it by."""
    global _pipe
    _end_no_more()
    if _pipe is not None:
        signal.set_wakeup_fd(-1)
        for number in _before:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
        _pipe = None
        _before.clear()


os.register_at_fork(after_in_child=_in_child)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Catches STOPPING inside the block; blocks may lie in one another and share one request.

    Interrupted where a signal has ended the work at once. If one came, later ones change nothing to the process's end:
    all is saved, and a second one must not turn the documented exit code into a death by signal.
    """
    global _blocks, _request
    if not _blocks and _request.over:  # the process has lived on
        _let_go()
        _request = StopRequest()
    caught = _pipe is not None
    _blocks += 1
    try:
        _catch()
        _request.check()
        yield _request
    except Stopped as stopped:
        _request.leave()
        raise Interrupted(left_at_once(str(stopped))) from None
    except (RuntimeError, RunFailed) as error:  # such as that of a collective which another rank has left
        if not _request or _request.unsaved:
            raise
        raise Interrupted(left_at_once(str(_request.name))) from error
    finally:
        _blocks -= 1
        if _request:
            _request.leave()
        else:
            _request.deferred = _request.unsaved = False
            if not caught:
                _let_go()


class StopConsensus:
    """Answers, once a step, whether any rank was asked to stop: the same on every rank at the same step.

    With several ranks the answer is that of the step before: the all-reduce runs between the hosts during the step,
    so no rank waits for it and no device takes part.
    """

    def __init__(self, stop: StopRequest, ranks: Ranks, also: Callable[[], bool] = lambda: False) -> None:
        """also: whether this process asks to stop for a reason of its own."""
        self._stop, self._ranks, self._also = stop, ranks, also
        self._asked: tuple[dist.Work, Tensor] | None = None

    def begin(self) -> None:
        """Steps follow. A process that is alone can leave at once until the first is done, others only together."""
        self.check()
        self._stop.deferred = self._ranks.count > 1

    def check(self) -> None:
        """Stopped if this process was asked to stop."""
        self._stop.check()

    def interruptible(self) -> AbstractContextManager[None]:
        """Around this process's part of work that is made again after a resume: `StopRequest.interruptible`."""
        return self._stop.interruptible()

    def end(self) -> None:
        """All steps are saved."""
        self._stop.deferred = self._stop.unsaved = False

    def __call__(self) -> bool:
        """To be called after every step."""
        self._stop.deferred = self._stop.unsaved = True
        if self._ranks.count == 1:
            return self._asks()
        import torch
        import torch.distributed as dist

        answer = self.close()
        flag = torch.tensor([float(self._asks())])
        work = dist.all_reduce(flag, async_op=True)
        assert work is not None
        self._asked = (work, flag)
        return answer

    def now(self) -> bool:
        """Whether any rank has been asked to stop by now; every rank waits for the answer."""
        before = self.close()
        return self._ranks.any([before or self._asks()])[0]

    def _asks(self) -> bool:
        return bool(self._stop) or self._also()

    def wait(self, seconds: float) -> None:
        """Lets time pass, but none once this process was asked to stop."""
        end = time.monotonic() + seconds
        while not self._stop and (left := end - time.monotonic()) > 0:
            time.sleep(min(0.1, left))

    def interrupted(self, saved: str) -> Interrupted:
        """What to raise once all ranks have agreed to stop and all is saved: `saved` says what and where."""
        self.close()
        self._stop.leave()
        error = Interrupted(f"{self.signal}: {saved}; the same command continues")
        error.told = self._ranks.first
        return error

    @property
    def signal(self) -> str:
        """The name of the signal that asked this process to stop, or that it was another one."""
        return self._stop.name or "a signal to another rank"

    def close(self) -> bool:
        """Waits for the all-reduce in flight, so that no rank leaves while another one needs it; gives its answer."""
        if self._asked is None:
            return False
        (work, flag), self._asked = self._asked, None
        self._ranks.heartbeat.beat("agree")
        work.wait()
        return flag.item() > 0
