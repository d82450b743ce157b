# Licensed under the Apache License, Version 2.0 (the "License"); you may
# not use this file except in compliance with the License. You may obtain
# a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
# WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
# License for the specific language governing permissions and limitations
# under the License.

"""Processes in the keeper: commands it runs, and exits it records."""

import collections
import collections.abc as cabc
import os
import resource
import signal
import time
import typing as ty

from nova_pycontainer.runtime import keeper_loop
from nova_pycontainer.runtime import keeper_memory
from nova_pycontainer.runtime import keeper_params
from nova_pycontainer.runtime import keeper_process

#: Exit statuses kept for a watch that comes after the exit.
MAX_EXITS: ty.Final = 1024
#: Seconds for a killed command to disappear before its caller is answered.
KILL_GRACE: ty.Final = 5.0
#: How often, and how long, a foreign parent is given to collect a child.
COLLECT_STEP: ty.Final = 0.05
COLLECT_TRIES: ty.Final = 40

Params = dict[str, ty.Any]
Answer = cabc.Callable[[Params | keeper_params.Refused], None]


class Command:
    """What "run" (``waits``) or "spawn" has started."""

    def __init__(
        self, argv0: str, started: keeper_process.Started, waits: bool,
        answer: Answer,
    ) -> None:
        self.argv0 = argv0
        self.pid = started.pid
        self.waits = waits
        self.failure: int | None = started.failure
        self.stdout = keeper_process.Tail(started.stdout)
        self.stderr = keeper_process.Tail(started.stderr)
        self.timeout_s = 0.0
        self.timed_out = False
        self._answer: Answer | None = answer

    def answer(self, what: Params | keeper_params.Refused) -> None:
        """Answer the caller; only the first answer counts."""
        answer, self._answer = self._answer, None
        if answer is not None:
            answer(what)


class Children:
    """All processes that the keeper is, or became, the parent of."""

    def __init__(
        self, loop: keeper_loop.Loop, log: cabc.Callable[[str], None],
        publish: cabc.Callable[[Params], None],
        memory: keeper_memory.Memory,
    ) -> None:
        self._loop = loop
        self._log = log
        self._publish = publish
        self._memory = memory
        self._commands: dict[int, Command] = {}
        self._watches: dict[int, keeper_memory.Watch] = {}
        self._exits: collections.OrderedDict[
            int, keeper_process.Exit] = collections.OrderedDict()
        # A host with a thousand consoles needs more than the usual 1024;
        # children get back what the keeper was started with.
        self._nofile = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (self._nofile[1], self._nofile[1]))

    def watched(self) -> dict[str, list[int]]:
        """uuid → pids whose exits are awaited."""
        pids: dict[str, list[int]] = {}
        for pid, watch in self._watches.items():
            pids.setdefault(watch.uuid, []).append(pid)
        return pids

    # Commands

    def run(self, params: Params, fds: list[int], answer: Answer) -> None:
        """Start a command and answer with its result when it ends."""
        command = self._start(params, fds, True, answer)
        command.timeout_s = float(params['timeout_s'])
        self._loop.after(
            command.timeout_s, lambda: self._on_timeout(command))

    def spawn(self, params: Params, fds: list[int], answer: Answer) -> None:
        """Start a command and answer with its pid once it executes."""
        self._start(params, fds, False, answer)

    def _start(
        self, params: Params, fds: list[int], waits: bool, answer: Answer
    ) -> Command:
        started = keeper_process.start(
            params['argv'], params.get('env') or keeper_params.DEFAULT_ENV,
            params.get('cwd') or '/',
            dict(zip(params.get('fds') or [], fds)),
            params.get('cgroup_procs') or [], waits, self._nofile)
        command = Command(params['argv'][0], started, waits, answer)
        self._commands[command.pid] = command
        self._loop.watch(started.failure, keeper_loop.READ,
                         lambda _: self._on_failure(command))
        self._watch_output(command.stdout)
        self._watch_output(command.stderr)
        return command

    def _watch_output(self, tail: keeper_process.Tail) -> None:
        def on_output(_: int) -> None:
            if not tail.read():
                self._close_output(tail)

        if tail.fd is not None:
            self._loop.watch(tail.fd, keeper_loop.READ, on_output)

    def _close_output(self, tail: keeper_process.Tail) -> None:
        if tail.fd is not None:
            self._loop.forget(tail.fd)
            os.close(tail.fd)
            tail.fd = None

    def _on_failure(self, command: Command) -> None:
        """The command executes now, or this says why it cannot."""
        if command.failure is None:
            return
        try:
            raw = os.read(command.failure, 4096)
        except BlockingIOError:
            return
        self._loop.forget(command.failure)
        os.close(command.failure)
        command.failure = None
        failed = keeper_process.failure_text(raw)
        if failed is not None:
            step, number, text = failed
            command.answer(keeper_params.Refused(
                keeper_process.code_of(number),
                f'cannot start {command.argv0}', step=step, cause=text))
        elif not command.waits:
            command.answer({'pid': command.pid})

    def _on_timeout(self, command: Command) -> None:
        if self._commands.get(command.pid) is not command:
            return
        command.timed_out = True
        try:
            # Not collected yet, so neither pid nor group can be another's.
            os.killpg(command.pid, signal.SIGKILL)
        except ProcessLookupError:
            # Before its setsid().
            os.kill(command.pid, signal.SIGKILL)
        self._loop.after(KILL_GRACE, lambda: command.answer(
            self._timeout_error(command)))

    def _timeout_error(self, command: Command) -> keeper_params.Refused:
        said = command.stderr.text() or command.stdout.text()
        return keeper_params.Refused(
            'timeout', f'{command.argv0} took longer than '
            f'{command.timeout_s:g} s and was killed',
            cause=said[-1024:].strip() or None)

    def _on_command_exit(
        self, command: Command, how: keeper_process.Exit
    ) -> None:
        self._on_failure(command)
        for tail in (command.stdout, command.stderr):
            # What the command itself wrote is here by now. Something that it
            # left behind may hold the pipe open for ever: do not wait.
            tail.read(rounds=16)
            self._close_output(tail)
        if command.timed_out:
            command.answer(self._timeout_error(command))
        elif command.waits:
            command.answer({
                'returncode': how.code if how.code is not None
                else -(how.signal or 0),
                'stdout_tail': command.stdout.text(),
                'stderr_tail': command.stderr.text(),
            })

    # Exits

    def reap(self) -> None:
        """Collect the children that have ended; tell who waits for them."""
        for how in keeper_process.reap():
            command = self._commands.pop(how.pid, None)
            watch = self._watches.pop(how.pid, None)
            if watch is not None:
                self._record(watch, how)
            elif command is None or not command.waits:
                self._exits[how.pid] = how
                self._exits.move_to_end(how.pid)
                if len(self._exits) > MAX_EXITS:
                    self._exits.popitem(last=False)
            if command is not None:
                self._on_command_exit(command, how)

    def _record(
        self, watch: keeper_memory.Watch, how: keeper_process.Exit
    ) -> None:
        try:
            keeper_process.write_exit(watch.exit_path, how)
        except OSError as e:
            # The container's directory may have been deleted meanwhile.
            self._log(f'exit of {watch.uuid}: {e}')
        self._memory.forget_watch(watch)
        self._publish({'event': 'exit', 'uuid': watch.uuid, **how.as_dict()})

    def watch(self, params: Params) -> Params:
        """Record the exit of a process, which may be in the past.

        :raises Refused: ``not_found``
        """
        pid, born = params['pid'], params.get('start_time')
        watch = keeper_memory.Watch(
            params['uuid'], pid, born or keeper_process.start_time(pid),
            params['exit_path'])
        past = self._exits.get(pid)
        if keeper_process.is_child(pid):
            self._check_identity(pid, born)
            self._add(watch)
        elif past is not None and born in (None, past.start_time):
            del self._exits[pid]
            self._record(watch, past)
            return {'exited': True}
        else:
            self._watch_foreign(watch)
        return {'exited': False}

    def restore(self, watch: keeper_memory.Watch) -> None:
        """Go on with what a former keeper has begun."""
        try:
            self._watch_foreign(watch)
        except keeper_params.Refused:
            # It ended in between, and nobody has seen how.
            self._record(watch, _unseen(watch.pid))

    def _add(self, watch: keeper_memory.Watch) -> None:
        self._watches[watch.pid] = watch
        self._memory.watch(watch)

    def _check_identity(self, pid: int, born: int | None) -> None:
        if born is not None and keeper_process.start_time(pid) != born:
            raise keeper_params.Refused(
                'not_found', f'process {pid} is another one by now')

    def _watch_foreign(self, watch: keeper_memory.Watch) -> None:
        """Watch a process with another parent, as after our own restart."""
        pid = watch.pid
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as e:
            raise keeper_params.Refused(
                'not_found', f'there is no process {pid}',
                cause=e.strerror) from e
        try:
            self._check_identity(pid, watch.start_time)
        except keeper_params.Refused:
            os.close(pidfd)
            raise
        self._add(watch)
        self._loop.watch(
            pidfd, keeper_loop.READ,
            lambda _: self._on_foreign_exit(pidfd, watch, 0))

    def _on_foreign_exit(
        self, pidfd: int, watch: keeper_memory.Watch, tries: int
    ) -> None:
        pid = watch.pid
        self._loop.forget(pidfd)
        if self._watches.get(pid) is not watch:
            # It became our child and was collected, or is watched anew.
            os.close(pidfd)
            return
        status = keeper_process.pidfd_status(pidfd)
        if status is None and tries < COLLECT_TRIES:
            self._loop.after(COLLECT_STEP, lambda: self._on_foreign_exit(
                pidfd, watch, tries + 1))
            return
        os.close(pidfd)
        del self._watches[pid]
        self._record(watch, _unseen(pid) if status is None
                     else keeper_process.Exit.from_status(pid, status))


def _unseen(pid: int) -> keeper_process.Exit:
    return keeper_process.Exit(pid, None, None, time.time(), None)
