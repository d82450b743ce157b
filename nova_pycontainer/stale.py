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

"""Requests that nova-compute has given up, and that come all the same.

A restart of it clears the task of a server, or settles it; the message that
asked for it may still be in the queue. The manager notices when it writes down
what was done, which is too late: a server that is ACTIVE would be paused.
"""

from nova import context as nova_context
from nova import objects
from oslo_log import log as logging

LOG = logging.getLogger(__name__)


def given_up(instance):
    """Whether the task that a request is about is none any more.

    Who does nothing then leaves the rest to the manager: it refuses to write
    the end of such a task down.

    :param instance: as it came with the request
    """
    asked = instance.task_state
    if asked is None:
        return False
    now = objects.Instance.get_by_uuid(
        nova_context.get_admin_context(), instance.uuid).task_state
    if now == asked:
        return False
    LOG.warning('A request of before a restart is dropped: it is not %s any '
                'more', asked, instance=instance)
    return True
