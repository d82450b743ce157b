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

"""The end of a live migration in Nova's records, on both hosts.

The server runs on the destination. If something fails in the compute manager's
part of the end (``ComputeManager._post_live_migration``), it gives up: it
calls the server the destination's (``_post_live_migration_update_host``), and
then has it in ERROR. Much can fail for a moment: above all one half is a
question to the destination's nova-compute, which is lost if that one ends
meanwhile. So it is done again here, all of it, as after a restart of this
service.
"""

import time

from nova.compute import task_states
from nova import exception
from nova.i18n import _
from oslo_log import log as logging
import oslo_messaging

from nova_pycontainer import attachments
from nova_pycontainer import patience
from nova_pycontainer import spawn
from nova_pycontainer import steps

LOG = logging.getLogger(__name__)

#: Nobody's answer is waited for ``rpc_response_timeout`` (60 s). A host that
#: never comes back can be evacuated then.
_TRIES = 5
_PAUSE_S = 10.0
#: What the managers change when it fails.
_RECORD = ('host', 'node', 'compute_id', 'vm_state')


def finish(instance, post_method):
    """Have the compute manager do its part of the end.

    :param post_method: called without arguments; it may be called again
    """
    record = {name: getattr(instance, name) for name in _RECORD}
    # Somebody deletes it, for one.
    for_good = (exception.InstanceNotFound, exception.UnexpectedTaskStateError)
    for left in reversed(range(_TRIES)):
        try:
            post_method()
            return
        except Exception as e:
            if not left or isinstance(e, for_good) or not _take_back(
                    instance, record):
                raise
            LOG.warning(
                'The server runs on the destination, and that cannot be '
                'recorded (%s: %s); it is tried again, at most %d times. See '
                'that nova-compute runs on the destination', type(e).__name__,
                e, left, instance=instance)
            if not isinstance(e, oslo_messaging.MessagingTimeout):
                time.sleep(_PAUSE_S)
        # What was asked before may be done after all, meanwhile.
        for_good = (exception.InstanceNotFound,)


def _take_back(instance, record):
    """Undo what the managers have made of the server's record.

    :returns: whether it is as before; else somebody does something with it
    """
    try:
        instance.refresh()
        for name, value in record.items():
            setattr(instance, name, value)
        instance.task_state = task_states.MIGRATING
        instance.save(expected_task_state=[None, task_states.MIGRATING])
    except (exception.InstanceNotFound,
            exception.UnexpectedTaskStateError) as e:
        LOG.info('Its migration is not finished: %s', e, instance=instance)
        return False
    return True


def arrived(client, instance):
    """Nova makes the server this host's.

    :param client: client of the agent
    :returns: whether it has ended since with the power of this host
    :raises nova.exception.MigrationError: it is not here
    """
    with steps.Steps('post_live_migration', instance) as changes:
        with changes.step('arrived'):
            info = patience.call(client.info, instance.uuid)
            if info['state'] not in ('running', 'paused', 'stopped'):
                raise exception.MigrationError(
                    reason=_('the container is %s after its migration') %
                    info['state'])
            # The compute manager saves it with the instance.
            instance.system_metadata[spawn.BASE_ID] = str(info['base_id'])
            attachments.forget(instance)
        changes.success()
    if info['state'] != 'stopped':
        return False
    # Else its guest has shut down, or was killed.
    ended = info.get('exit') or {}
    LOG.warning('It came here, and has ended since: %s', ended,
                instance=instance)
    return ended.get('code') is None and ended.get('signal') is None
