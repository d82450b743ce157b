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
meanwhile. So it is done again, as after a restart of this service, as long as
the records say that it is still to be done.
"""

import enum
import functools
import time

from nova.compute import task_states
from nova.compute import vm_states
from nova import exception
from nova.i18n import _
from nova import objects
from nova.objects import fields
from oslo_log import log as logging
import oslo_messaging

from nova_pycontainer import attachments
from nova_pycontainer import patience
from nova_pycontainer import spawn
from nova_pycontainer import steps

LOG = logging.getLogger(__name__)

#: Seconds. Nobody's answer is waited for ``rpc_response_timeout`` (60 s); a
#: host that never comes back can be evacuated then.
_LONGEST_S = 300.0
_PAUSE_S = 10.0


class Record(enum.Enum):
    """What Nova's database says of the end."""

    OPEN = 'the server is migrating'
    DONE = 'the destination has the server'
    GONE = 'the server is deleted'
    CHANGED = 'somebody has done something with it'
    UNKNOWN = 'the database cannot be read'


class Handover:
    """One server that its agent calls moved.

    :param migration: a nova.objects.Migration
    :param post_method: the compute manager's
    :param arguments: for it
    """

    def __init__(self, context, instance, migration, post_method, arguments):
        self._context = context
        self._instance = instance
        self._migration = migration
        self._give_up = functools.partial(post_method, *arguments)
        self._manager = self._try = None
        if isinstance(post_method, functools.partial):
            self._manager = post_method.func.__self__
            # What ComputeManager._post_live_migration_update_host does first.
            self._try = functools.partial(
                self._manager._post_live_migration, *arguments,
                **post_method.keywords)

    def finish(self):
        """Have the compute manager do its part of the end.

        :raises nova.exception.MigrationError: it could not; the server runs
            on the destination
        """
        if self._try is None:
            # Nova has another way, which nothing is known of.
            self._give_up()
            return
        deadline = time.monotonic() + _LONGEST_S
        while self._failed(deadline):
            pass

    def _failed(self, deadline):
        """:returns: whether it is to be tried again"""
        try:
            self._try()
            return False
        except Exception as e:
            error = e
        found = record(self._instance, self._migration)
        LOG.warning(
            'The server runs on %s, and Nova could not be told (%s: %s); %s. '
            'See that nova-compute runs there', self._migration.dest_compute,
            type(error).__name__, error, found.value, instance=self._instance)
        if found is Record.GONE:
            self._gone()
            return False
        if found is Record.DONE:
            self._settle()
            return False
        if found is Record.CHANGED or time.monotonic() >= deadline:
            self._let_go(error)
            return False
        if not isinstance(error, oslo_messaging.MessagingTimeout):
            time.sleep(_PAUSE_S)
        return True

    def _let_go(self, error):
        """As Nova does: it is the destination's, and in ERROR."""
        try:
            self._give_up()
        except exception.InstanceNotFound:
            self._gone()
            return
        except Exception as e:
            error = e
        else:
            return
        self._settle()
        raise exception.MigrationError(
            reason=_('the server runs on %(host)s, whose nova-compute did not '
                     'take it over: %(error)s. When that is there again, set '
                     'the state of the server to active; or evacuate it') %
            {'host': self._migration.dest_compute,
             'error': f'{type(error).__name__}: {error}'}) from error

    def _gone(self):
        delete_at(self._context, self._manager, self._instance,
                  self._migration.dest_compute)
        self._settle()

    def _settle(self):
        settle(self._context, self._manager, self._instance, self._migration)


def record(instance, migration):
    """What Nova's database says."""
    context = instance._context.elevated()
    try:
        now = objects.Instance.get_by_uuid(context, instance.uuid)
        last = last_live_migration(context, instance.uuid)
    except exception.InstanceNotFound:
        return Record.GONE
    except Exception as e:
        LOG.warning('%s', e, instance=instance)
        return Record.UNKNOWN
    if now.host != migration.source_compute or last.id != migration.id:
        return Record.DONE
    if now.task_state == task_states.MIGRATING:
        return Record.OPEN
    if (now.task_state == task_states.DELETING or
            now.vm_state == vm_states.DELETED):
        return Record.GONE
    return Record.CHANGED


def delete_at(context, manager, instance, host):
    """Have a server deleted where it is. Never raises.

    Nova has asked the source, which had it when the deletion was asked for.
    """
    LOG.info('It is deleted, and is on %s by now, which is asked to', host,
             instance=instance)
    try:
        there = objects.Instance.get_by_uuid(context, instance.uuid)
        # Also for who is asked after us.
        there.host = host
        there.save()
        manager.compute_rpcapi.terminate_instance(
            context, there,
            objects.BlockDeviceMappingList.get_by_instance_uuid(
                context, instance.uuid))
    except Exception as e:
        LOG.error('It is left on %s, where nova-compute looks for such every '
                  '[DEFAULT]running_deleted_instance_poll_interval seconds: '
                  '%s', host, e, instance=instance)


def live_migrations(context, **filters):
    return objects.MigrationList.get_by_filters(context, {
        'migration_type': fields.MigrationType.LIVE_MIGRATION, **filters})


def last_live_migration(context, uuid):
    """The newest one of a server, or None."""
    return max(live_migrations(context, instance_uuid=uuid),
               key=lambda found: found.id, default=None)


def settle(context, manager, instance, migration):
    """What is left to do when the destination has the server. Never raises.

    :param manager: the source's compute manager
    """
    migration.status = 'completed'
    for what, method in (
            ('its record', migration.save),
            ('its allocation', functools.partial(
                manager._delete_allocation_after_move, context, instance,
                migration)),
            ('its port bindings', functools.partial(
                _unbind, context, manager, instance, migration))):
        try:
            method()
        except Exception as e:
            LOG.warning('What is left of migration %s, %s: %s',
                        migration.uuid, what, e, instance=instance)


def _unbind(context, manager, instance, migration):
    try:
        now = objects.Instance.get_by_uuid(context, instance.uuid)
    except exception.InstanceNotFound:
        return
    if now.host == migration.dest_compute:
        manager.network_api.setup_networks_on_host(
            context, now, migration.source_compute, teardown=True)


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
