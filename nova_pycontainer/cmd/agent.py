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

"""pycontainer-agent: the root daemon that owns the containers of a host."""

import contextlib
import os
import resource
import signal
import sys
import threading
import types

from oslo_config import cfg
from oslo_log import log as logging

from nova_pycontainer.agent import options
from nova_pycontainer.agent import server
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import host as rhost
from nova_pycontainer.runtime import keeper_client
from nova_pycontainer.runtime import keeper_memory

LOG = logging.getLogger(__name__)

#: Seconds between two looks for a signal.
_LOOK_S = 1.0

#: Seconds by which systemd is asked to wait longer, again and again.
_EXTEND_S = 60.0


def _configure(argv: list[str] | None) -> cfg.ConfigOpts:
    conf = cfg.ConfigOpts()
    options.register(conf)
    logging.register_options(conf)
    conf(argv, project='pycontainer', prog='pycontainer-agent',
         description='Owns the system containers of this host.')
    logging.setup(conf, 'pycontainer-agent')
    return conf


class Agent:
    """The process: it is started once, and ends on SIGTERM."""

    def __init__(self, conf: cfg.ConfigOpts) -> None:
        self._group = conf.pycontainer
        self._config = options.runtime_config(conf)
        self._notifier = keeper_memory.Notifier()
        self._ended = threading.Event()
        self._failed = False
        self._signals = 0

    def run(self) -> int:
        """:raises ContainerError: the host or the socket cannot be used"""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        # Like a reload that changes nothing; by default it would end us.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        state_dir = self._config.state_dir
        state_dir.mkdir(mode=0o711, parents=True, exist_ok=True)
        # Two agents must not rebuild and clean up the same directory, be
        # their sockets the same or not.
        lock = server.exclusive(str(state_dir / 'agent'), 'agent')
        try:
            self._config.run_dir.mkdir(
                mode=0o755, parents=True, exist_ok=True)
            # Before the limit is raised, which it would hand on.
            keeper_client.ensure_keeper(self._config.keeper_socket)
            _raise_open_files()
            host = rhost.Host(self._config)
            host.start()
            if self._group.preflight_at_start:
                host.preflight.start()
            try:
                return self._serve(host)
            finally:
                host.close()
        finally:
            os.close(lock)

    def _serve(self, host: rhost.Host) -> int:
        served = server.AgentServer(
            self._group.agent_socket, host, self._group.agent_group)
        thread = threading.Thread(
            target=self._loop, args=(served,), name='server', daemon=True)
        thread.start()
        self._notifier.send('READY=1')
        LOG.info('Serving %s', self._group.agent_socket)
        # A signal that the kernel gives to another thread wakes nobody here,
        # and Python runs its handler only when this thread does something.
        while not self._ended.wait(_LOOK_S):
            pass
        LOG.info('Ending; the containers run on')
        self._notifier.send('STOPPING=1')
        if not served.stop(self._group.agent_stop_timeout):
            LOG.warning('Ending in the middle of requests; what they began '
                        'is undone or finished at the next start')
        left = host.migrations.drain(
            self._group.agent_stop_timeout, self._may_wait)
        for uuid in left:
            LOG.error('Ending in the middle of the post-copy of instance %s, '
                      'which is lost if it is not finished', uuid)
        return 1 if self._failed else 0

    def _may_wait(self) -> bool:
        """Ask systemd for time; whoever does not want to wait says so twice.
        """
        with contextlib.suppress(OSError):
            self._notifier.send(f'EXTEND_TIMEOUT_USEC={int(_EXTEND_S * 1e6)}')
        return self._signals < 2

    def _loop(self, served: server.AgentServer) -> None:
        try:
            served.serve_forever()
        except BaseException:
            # Better no agent than one that does not answer.
            self._failed = True
            LOG.exception('The server has failed')
        finally:
            self._ended.set()

    def _on_signal(self, number: int, _: types.FrameType | None) -> None:
        self._signals += 1
        self._ended.set()


def _raise_open_files() -> None:
    """Each container costs descriptors here; what we start sets its own."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main(argv: list[str] | None = None) -> int:
    conf = _configure(argv)
    if os.geteuid():
        print('pycontainer-agent has to be started by root', file=sys.stderr)
        return 1
    try:
        return Agent(conf).run()
    except errors.ContainerError as e:
        LOG.critical('%s', e)
        return 1


if __name__ == '__main__':
    sys.exit(main())
