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

"""What happens to containers by itself, and whether the agent is there.

One thread follows the agent's events. The connection that it waits on is also
the quickest way to learn that the agent is gone, so the same thread watches
over that.
"""

import threading
import time

from nova.virt import event as virtevent
from oslo_log import log as logging

from nova_pycontainer.runtime import errors

LOG = logging.getLogger(__name__)

#: Seconds that one request for events waits.
_POLL_S = 30

#: Seconds between two attempts to reach the agent.
_RETRY_S = 1.0

_TRANSITIONS = {
    'started': virtevent.EVENT_LIFECYCLE_STARTED,
    # The guest is the same to Nova, and it runs.
    'rebooted': virtevent.EVENT_LIFECYCLE_STARTED,
    'stopped': virtevent.EVENT_LIFECYCLE_STOPPED,
    'paused': virtevent.EVENT_LIFECYCLE_PAUSED,
    'unpaused': virtevent.EVENT_LIFECYCLE_RESUMED,
}


def lifecycle_event(event):
    """Return Nova's event for one of the agent's, or None."""
    transition = _TRANSITIONS.get(event['type'])
    if transition is None:
        return None
    return virtevent.LifecycleEvent(event['uuid'], transition, event['at'])


class Watcher:
    """Follows the agent.

    :param client: client of the agent
    :param emit: called with each nova.virt.event.LifecycleEvent
    :param on_up: called when the agent answers after it did not, and at the
        start; again until it returns true
    :param on_down: called with the error when the agent has not answered for
        ``patience`` seconds; again until it returns true
    :param on_reboot: called with the uuid of a guest that has rebooted by
        itself
    :param clock: seconds, monotonic
    """

    def __init__(self, client, emit, on_up, on_down, *, patience,
                 on_reboot=lambda uuid: None, poll=_POLL_S, retry=_RETRY_S,
                 clock=time.monotonic):
        self._client = client
        self._on_reboot = on_reboot
        self._emit = emit
        self._on_up = on_up
        self._on_down = on_down
        self._patience = patience
        self._poll = poll
        self._retry = retry
        self._clock = clock
        self._stop = threading.Event()
        self._thread = None
        self._lock = threading.Lock()
        self._lost_at = None
        self._reported = False
        self._told = False
        #: Why the agent cannot be reached, or None while it can.
        self.failure = None

    def start(self):
        """Start the thread, if it does not run yet."""
        with self._lock:
            if self._thread is None and not self._stop.is_set():
                self._thread = threading.Thread(
                    target=self._run, name='pycontainer-events', daemon=True)
                self._thread.start()

    def stop(self):
        """End the thread; it may still be inside its last request."""
        self._stop.set()

    def _run(self):
        while not self._stop.is_set():
            try:
                self._follow()
            except errors.ContainerError as e:
                # An agent that refuses to talk, say for its version, is as
                # good as gone.
                self._lost(e)
            except Exception:
                # Without this thread a guest that powers itself off would
                # only be noticed by the periodic task.
                LOG.exception('Cannot follow the events of the agent, '
                              'trying again')
            self._stop.wait(self._retry)

    def _follow(self):
        """Report events until the agent fails or the thread is to end."""
        # What happened before is found by looking at the containers; asking
        # for the number of the last event first leaves no gap between.
        last = max((event['seq'] for event in self._client.events(0, 0)),
                   default=0)
        settled = self._found()
        self._report_stopped()
        while not self._stop.is_set():
            for event in self._client.events(
                    last, self._poll if settled else self._retry):
                last = event['seq']
                if self._stop.is_set():
                    return
                if event['type'] == 'rebooted':
                    self._on_reboot(event['uuid'])
                translated = lifecycle_event(event)
                if translated is not None:
                    self._emit(translated)
            settled = settled or self._on_up()

    def _report_stopped(self):
        """Tell Nova of the guests that stopped while nobody listened.

        Nova compares with its own record and does nothing where that says
        the same (ComputeManager.handle_lifecycle_event).
        """
        for info in self._client.list():
            if info['state'] == 'stopped':
                self._emit(virtevent.LifecycleEvent(
                    info['uuid'], virtevent.EVENT_LIFECYCLE_STOPPED))

    def _found(self):
        if self.failure is not None:
            LOG.info('The pycontainer agent answers again')
        self.failure = None
        self._lost_at = None
        self._reported = self._told = False
        return self._on_up()

    def _lost(self, error):
        now = self._clock()
        if self.failure is None:
            self._lost_at = now
            LOG.warning('%s', error)
        self.failure = error
        if not self._reported and now - self._lost_at >= self._patience:
            if not self._told:
                LOG.error('%s. Until then no server of this host can be '
                          'managed; none of them is reported as stopped',
                          error)
            self._told = True
            self._reported = self._on_down(error)
