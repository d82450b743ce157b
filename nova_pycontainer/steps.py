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

"""Multi-step changes of the driver: undone when they fail, and timed."""

import contextlib
import time

from oslo_log import log as logging

from nova_pycontainer.runtime import revert

LOG = logging.getLogger(__name__)


class Steps(revert.Reverter):
    """A reverter that knows how long each step took.

    One line at the end says so, in a form that a program can read:
    ``spawn took 1.234 s: image=0.002 network=0.481 …``. Steps of one name
    are added up.

    :param verb: what the change is called, in the log and before each step's
        name
    """

    def __init__(self, verb, instance):
        super().__init__(instance.uuid)
        self._verb = verb
        self._instance = instance
        self._began = time.monotonic()
        self.seconds = {}

    @contextlib.contextmanager
    def step(self, name, undo=None):
        began = time.monotonic()
        try:
            with super().step(f'{self._verb}.{name}', undo):
                yield
        finally:
            self.seconds[name] = (
                self.seconds.get(name, 0) + time.monotonic() - began)

    def __exit__(self, exc_type, exc, tb):
        super().__exit__(exc_type, exc, tb)
        LOG.info(
            '%(verb)s %(how)s %(total).3f s: %(steps)s',
            {'verb': self._verb,
             'how': 'took' if exc is None else 'failed after',
             'total': time.monotonic() - self._began,
             'steps': ' '.join(f'{name}={seconds:.3f}' for name, seconds
                               in self.seconds.items())},
            instance=self._instance)
