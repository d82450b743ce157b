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

"""The network of a guest that has rebooted by itself.

Its interfaces ended with it, and the agent has made others of the same names.
Open vSwitch's kernel datapath takes those; the userspace one keeps what is
gone, and the guest would have no network until Nova reboots it.
"""

import threading

from nova import context as nova_context
from nova import objects
from nova import utils
from oslo_log import log as logging

from nova_pycontainer import vif

LOG = logging.getLogger(__name__)


def begin(client, uuid):
    """Plug its VIFs again, beside what the caller does.

    :param client: client of the agent
    """
    threading.Thread(target=_replug, args=(client, uuid),
                     name=f'replug-{uuid}', daemon=True).start()


def _replug(client, uuid):
    # The manager's lock: a server that is deleted meanwhile would leave
    # ports of the switch behind.
    utils.synchronized(uuid)(_replug_locked)(client, uuid)


def _replug_locked(client, uuid):
    try:
        info = client.find(uuid)
        if info is None or info['state'] != 'running':
            return
        instance = objects.Instance.get_by_uuid(
            nova_context.get_admin_context(), uuid)
        vif.plug_anew(instance, instance.get_network_info())
    except Exception as e:
        # It would end the thread without a word.
        LOG.error('Instance %s has rebooted, and has no network until Nova '
                  'reboots it: %s', uuid, e)
