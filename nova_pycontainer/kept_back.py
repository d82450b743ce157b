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

"""Servers that the compute manager does not look at when it starts.

What was begun with them goes on, and it would take that for something that
has failed. Each is followed in a thread of its own when the manager is ready.
"""

import abc
import threading

from nova import objects


class KeptBack(abc.ABC):
    """Those of one kind.

    :param name: of their threads
    """

    def __init__(self, name):
        self._name = name
        self._found = []
        self._followed = set()
        self._lock = threading.Lock()

    @abc.abstractmethod
    def _begun(self, context, instance):
        """Return what was begun with an instance, or None."""

    @abc.abstractmethod
    def _follow(self, instance, begun):
        """Bring it to its end; never raises."""

    def keep_back(self, context, instances):
        """Return the instances of which the manager may know all.

        :param instances: an InstanceList
        """
        found, others = [], []
        for instance in instances:
            begun = self._begun(context, instance)
            if begun is None:
                others.append(instance)
            else:
                found.append((instance, begun))
        with self._lock:
            self._found = found
        return objects.InstanceList(context, objects=others)

    def start(self):
        """Follow those that were kept back. The manager is ready for it."""
        with self._lock:
            found, self._found = self._found, []
            self._followed.update(instance.uuid for instance, _ in found)
        for instance, begun in found:
            threading.Thread(
                target=self._bring_to_its_end, args=(instance, begun),
                name=f'{self._name}-{instance.uuid}', daemon=True).start()

    def _bring_to_its_end(self, instance, begun):
        try:
            self._follow(instance, begun)
        finally:
            with self._lock:
                self._followed.discard(instance.uuid)

    def has(self, uuid):
        """Whether the manager is kept from an instance still."""
        with self._lock:
            return uuid in self._followed or any(
                instance.uuid == uuid for instance, _ in self._found)
