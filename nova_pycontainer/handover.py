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

"""The end of a live migration, when the destination's nova-compute is away.

The server runs on the destination, and of the compute manager's part of the
end (``ComputeManager._post_live_migration``) one half is a question to the
destination's. If that one ends in the middle, or is not there, nobody answers
within ``rpc_response_timeout``, and the manager here gives up: it calls the
server the destination's (``_post_live_migration_update_host``), and then has
it in ERROR. It is asked again here, as after a restart of this service.
"""

from nova.compute import task_states
from nova import exception
from oslo_log import log as logging
import oslo_messaging

LOG = logging.getLogger(__name__)

#: Each takes ``rpc_response_timeout`` (60 s). A host that never comes back can
#: be evacuated then.
_TRIES = 5
#: What the manager changes when it gives up.
_HOME = ('host', 'node', 'compute_id')


def finish(instance, post_method):
    """Have the compute manager do its part of the end.

    :param post_method: called without arguments; it may be called again
    """
    home = {name: getattr(instance, name) for name in _HOME}
    retried = (oslo_messaging.MessagingTimeout,)
    for left in reversed(range(_TRIES)):
        try:
            post_method()
            return
        except retried as e:
            if not left or not _take_back(instance, home):
                raise
            LOG.warning(
                'The server runs on the destination, and nova-compute there '
                'has not answered (%s). It is asked again, at most %d times; '
                'see that it runs', e, left, instance=instance)
        # What was asked before may be done after all, meanwhile.
        retried = (oslo_messaging.MessagingTimeout,
                   exception.UnexpectedTaskStateError)


def _take_back(instance, home):
    """Undo what the manager has made of the server's record.

    :returns: whether it is as before; else somebody does something with it
    """
    try:
        instance.refresh()
        for name, value in home.items():
            setattr(instance, name, value)
        instance.task_state = task_states.MIGRATING
        instance.save(expected_task_state=[None, task_states.MIGRATING])
    except (exception.InstanceNotFound,
            exception.UnexpectedTaskStateError) as e:
        LOG.info('Its migration is not finished: %s', e, instance=instance)
        return False
    return True
