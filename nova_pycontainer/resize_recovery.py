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

"""Cold migrations and resizes whose last part nova-compute did not finish.

The last part is the destination's: it gets the files, and starts the server.
Nova asks for it with a message that is gone when nova-compute ends in the
middle, and nobody asks again; the server stays as it is for ever. What it has
come to is still to be seen, so it is begun again where it was left
(:meth:`.arrival.Arrivals.go_on`).
"""

import time

from nova.compute import task_states
from nova.compute import vm_states
from nova import context as nova_context
from nova import exception
from nova import objects
from nova import utils
from oslo_log import log as logging

from nova_pycontainer import arrival
from nova_pycontainer import kept_back
from nova_pycontainer import migration_data

LOG = logging.getLogger(__name__)

#: For a message that has not come yet to come, in seconds.
_MESSAGE_S = 20.0
#: For the source to boot: it may have lost its power when this host did.
_BOOT_S = 600.0
_TASKS = (task_states.RESIZE_MIGRATED, task_states.RESIZE_FINISH)


class Recovery(kept_back.KeptBack):
    """Goes on with them after a start of nova-compute.

    With ``resume_guests_state_on_host_boot`` the manager would start such a
    server before it is here.

    :param virtapi: the compute manager's
    :param arrivals: a nova_pycontainer.arrival.Arrivals
    :param host: name of this compute service
    """

    def __init__(self, virtapi, arrivals, host):
        super().__init__('resize')
        self._virtapi = virtapi
        self._arrivals = arrivals
        self._host = host

    def _begun(self, _context, instance):
        if instance.host == self._host and (
                instance.task_state in _TASKS and
                instance.vm_state in (vm_states.ACTIVE, vm_states.STOPPED)):
            return instance.task_state
        return None

    def _follow(self, instance, task_state):
        context = nova_context.get_admin_context()
        try:
            if task_state == task_states.RESIZE_MIGRATED:
                # The message is most likely on its way still. If it was
                # taken, and this is how far it came, it does not come.
                time.sleep(_MESSAGE_S)
                instance.refresh()
                if instance.task_state != task_states.RESIZE_MIGRATED:
                    return
            self._finish(context, instance)
        except (exception.InstanceNotFound,
                exception.UnexpectedTaskStateError) as e:
            LOG.info('It has gone on: %s', e, instance=instance)
        except Exception:
            # The manager has written it down, but for what comes before.
            LOG.exception('The migration that was interrupted has failed',
                          instance=instance)
            self._virtapi._compute._set_instance_obj_error_state(
                instance, clean_task_state=True)

    def _finish(self, context, instance):
        record = arrival.record_of(context, instance)
        LOG.warning('It was %s by migration %s when nova-compute ended; '
                    'going on', instance.task_state, record.uuid,
                    instance=instance)
        here = record.source_compute == record.dest_compute
        if not here:
            self._arrivals.wait_for_source(
                context, instance, record, _BOOT_S)
        manager = self._virtapi._compute
        if instance.task_state == task_states.RESIZE_FINISH:
            if record.old_instance_type_id != record.new_instance_type_id:
                # It takes the flavor that it finds for the old one.
                manager._set_instance_info(instance, instance.old_flavor)
            instance.task_state = task_states.RESIZE_MIGRATED
            instance.save(expected_task_state=task_states.RESIZE_FINISH)
        # As the source's message would have called it.
        manager.finish_resize(
            context, migration_data.dump_disk_info(
                facts=None, migration=record.uuid, here=here),
            utils.get_image_from_system_metadata(instance.system_metadata),
            instance, record, _request_spec(context, instance))


def _request_spec(context, instance):
    """What the scheduler was asked for, or None.

    It is needed for ports with a guaranteed bandwidth only, and is not to be
    had where the cell's conductor does not know the API's database.
    """
    try:
        return objects.RequestSpec.get_by_instance_uuid(
            context, instance.uuid)
    except Exception as e:
        LOG.warning('Its request specification cannot be had: %s', e,
                    instance=instance)
        return None
