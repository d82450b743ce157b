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

from nova.compute import power_state
from nova.compute import task_states
from nova.compute import vm_states
from oslo_log import log as logging

from nova_pycontainer.runtime import errors

LOG = logging.getLogger(__name__)

#: What the manager would have written down at the end.
_ENDS = {
    'suspended': (vm_states.SUSPENDED, power_state.SUSPENDED),
    'running': (vm_states.ACTIVE, power_state.RUNNING),
}


def settle(client, instances):
    """Finish what the manager would have finished, before it looks at them.

    :param client: of the agent
    :param instances: those of this host
    """
    # Both wait for what the agent is about to do. A suspend that it has not
    # heard of is done now.
    verbs = {task_states.SUSPENDING: client.suspend,
             task_states.RESUMING: client.unpause}
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
            found = _ENDS.get(client.info(instance.uuid)['state'])
        except errors.ContainerError as e:
            LOG.warning('Whether it is suspended is not known: %s', e,
                        instance=instance)
            continue
        if (instance.task_state == task_states.RESUMING and
                found == _ENDS['suspended']):
            LOG.warning('It is to be resumed, and the agent does not do that. '
                        'If the request does not come again, reset the state '
                        'of the server to suspended', instance=instance)
        elif found is not None:
            LOG.info('It was %s when nova-compute ended, and is %s now',
                     instance.task_state, found[0], instance=instance)
            instance.vm_state, instance.power_state = found
            instance.task_state = None
            instance.save()
