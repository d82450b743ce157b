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

"""Suspends and resumes that went on while nova-compute was restarted.

It is the agent that saves and restores a server, so it goes on when the
process that has asked for it ends. Nova leaves such a server in its task state
for ever; and since it does not run, with ``resume_guests_state_on_host_boot``
it boots it anew, without what was saved.
"""

import threading

from nova.compute import power_state
from nova.compute import task_states
from nova.compute import vm_states
from nova import exception
from oslo_log import log as logging

from nova_pycontainer.runtime import errors

LOG = logging.getLogger(__name__)

#: For a request that was sent before the start to come, in seconds.
_MESSAGE_S = 20.0
#: What the manager would have written down at the end.
_ENDS = {
    'suspended': (vm_states.SUSPENDED, power_state.SUSPENDED),
    'running': (vm_states.ACTIVE, power_state.RUNNING),
    # The host has lost its power before it was saved, or after it ran again.
    # The manager finds that it does not run, and does as with the others.
    'stopped': (vm_states.ACTIVE, power_state.RUNNING),
}


class Recovery:
    """Those of one compute service.

    :param client: of the agent
    """

    def __init__(self, client):
        self._client = client
        #: That were to be resumed, and are not; and who was asked for since.
        self._waiting, self._asked = [], set()

    def settle(self, instances):
        """Finish what the manager would have finished, before it looks at
        them.

        :param instances: those of this host
        """
        # Both wait for what the agent is about to do. A suspend that it has
        # not heard of is done now.
        verbs = {task_states.SUSPENDING: self._client.suspend,
                 task_states.RESUMING: self._client.unpause}
        for instance in instances:
            verb = verbs.get(instance.task_state)
            if verb is None:
                continue
            try:
                verb(instance.uuid)
            except errors.ContainerError as e:
                # Most likely: it is suspended.
                LOG.debug('%s', e, instance=instance)
            try:
                state = self._client.info(instance.uuid)['state']
            except errors.ContainerError as e:
                LOG.warning('Whether it is suspended is not known: %s', e,
                            instance=instance)
                continue
            self._note(instance, _ENDS.get(state))

    def _note(self, instance, found):
        if (instance.task_state == task_states.RESUMING and
                found == _ENDS['suspended']):
            self._waiting.append(instance)
        elif found is not None:
            LOG.info('It was %s when nova-compute ended, and is %s now',
                     instance.task_state, found[0], instance=instance)
            instance.vm_state, instance.power_state = found
            instance.task_state = None
            instance.save()

    def start(self):
        """Wait for the requests that may still come. The manager is ready."""
        waiting, self._waiting = self._waiting, []
        for instance in waiting:
            timer = threading.Timer(_MESSAGE_S, self.give_up, (instance,))
            timer.daemon = True
            timer.start()

    def asked(self, instance):
        """The request to resume it has come."""
        self._asked.add(instance.uuid)

    def give_up(self, instance):
        """It came before this process began, and ended with the other."""
        if instance.uuid in self._asked:
            return
        try:
            instance.refresh()
            if instance.task_state != task_states.RESUMING:
                return
            LOG.warning('It was to be resumed when nova-compute ended, which '
                        'did not come to its end: it is suspended as before',
                        instance=instance)
            instance.task_state = None
            instance.save(expected_task_state=task_states.RESUMING)
        except exception.NovaException as e:
            LOG.info('It has gone on: %s', e, instance=instance)
