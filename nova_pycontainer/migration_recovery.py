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

"""Live migrations that go on while nova-compute is restarted.

It is the agent that migrates, so a migration outlives the process that asked
for it. Nova expects the opposite: at its start the compute manager calls such
a migration failed and the server this host's
(``ComputeManager._reset_live_migration``), and some minutes later it would
stop a server that has moved, because it does not run here.

So the servers whose migration was under way are kept back from the manager
until the agent has said how it ended, and then the manager does what it would
have done then.
"""

import functools
import time

from nova.compute import task_states
from nova import context as nova_context
from nova import exception
from nova import objects
from oslo_log import log as logging

from nova_pycontainer import attachments
from nova_pycontainer import handover
from nova_pycontainer import kept_back
from nova_pycontainer import migration
from nova_pycontainer import migration_data

LOG = logging.getLogger(__name__)

#: Statuses of migrations that the source's nova-compute has begun with.
#: Before them the request is still on its way, and will come (again).
_BEGUN = ('queued', 'preparing', 'running', 'post-migrating',
          migration.POST_COPY)
#: Seconds between two questions.
_RETRY_S = 10.0


class Recovery(kept_back.KeptBack):
    """Finds migrations that this service had begun before its restart.

    :param source: a nova_pycontainer.migration.Source
    :param virtapi: the compute manager's
    :param host: of this service
    """

    def __init__(self, source, virtapi, host):
        super().__init__('migration')
        self._source = source
        self._host = host
        self._virtapi = virtapi
        #: Records of others that this service had begun.
        self._open = []

    def _begun(self, context, instance):
        if instance.task_state != task_states.MIGRATING:
            return None
        record = self._migration(context, instance)
        if record is not None:
            LOG.info('Migration %s was %s when nova-compute ended',
                     record.uuid, record.status, instance=instance)
        return record

    @staticmethod
    def _migration(context, instance):
        """The newest one. Of others the end may not have been written down.
        """
        last = handover.last_live_migration(context, instance.uuid)
        if last is None or last.status not in _BEGUN or (
                last.source_compute != instance.host):
            return None
        return last

    def keep_back(self, context, instances):
        others = super().keep_back(context, instances)
        # Before others are asked for.
        self._open = [record for record in handover.live_migrations(
            context, source_compute=self._host, status=[*_BEGUN])
            if not self.has(record.instance_uuid)]
        return others

    def start(self):
        super().start()
        records, self._open = self._open, []
        for record in records:
            try:
                self._close(nova_context.get_admin_context(), record)
            except Exception:
                LOG.exception('Migration %s is not settled', record.uuid)

    def _close(self, context, record):
        """Its end was not written down when nova-compute ended."""
        manager = self._virtapi._compute
        try:
            instance = objects.Instance.get_by_uuid(
                context, record.instance_uuid)
        except exception.InstanceNotFound:
            instance = objects.Instance.get_by_uuid(
                context.elevated(read_deleted='yes'), record.instance_uuid)
        else:
            last = handover.last_live_migration(context, instance.uuid)
            if instance.host == record.source_compute and (
                    last.id == record.id):
                # It was rolled back, allocations included, or a restart has
                # given it up.
                LOG.info('Migration %s was %s when nova-compute ended, and '
                         'the server is here', record.uuid, record.status,
                         instance=instance)
                record.status = 'failed'
                record.save()
                return
        LOG.info('Migration %s was %s when nova-compute ended, and the server '
                 'has moved', record.uuid, record.status, instance=instance)
        handover.settle(context, manager, instance, record)

    def _follow(self, instance, record):
        context = nova_context.get_admin_context()
        data = migration_data.create(
            instance.get_network_info(), None, None,
            migration=record.uuid)
        data.migration = record
        if instance.numa_topology is not None:
            # The destination's manager has claimed CPUs for it.
            data.src_supports_numa_live_migration = True
        # What the manager would have given to live_migration().
        manager = self._virtapi._compute
        bdms = self._block_devices(context, manager, instance)
        post_method = functools.partial(
            manager._post_live_migration_update_host, source_bdms=bdms)
        recover_method = functools.partial(
            manager._rollback_live_migration, source_bdms=bdms)
        try:
            self._source.resume(
                context, instance, record.dest_compute, post_method,
                recover_method, data)
        except Exception:
            # As when it is the manager's thread that fails.
            LOG.exception('Live migration failed.', instance=instance)
            manager._set_migration_status(record, 'error')
            instance.refresh()
            manager._set_instance_obj_error_state(
                instance, clean_task_state=True)
        else:
            self._hand_over(context, manager, instance)

    @staticmethod
    def _block_devices(context, manager, instance):
        """Those of the source; Cinder is asked for as long as it takes.

        Without them nothing of the rest could be done, either.
        """
        while True:
            try:
                return attachments.of_source(
                    context, manager.volume_api, instance)
            except Exception as e:
                LOG.warning(
                    'The migration cannot be finished without what Cinder '
                    'knows of the volumes, which is asked again in %d s: %s. '
                    'See that it answers, and that [cinder] in nova.conf has '
                    'credentials', _RETRY_S, e, instance=instance)
                time.sleep(_RETRY_S)

    @staticmethod
    def _hand_over(context, manager, instance):
        """One that stays is the manager's again, which looks at it as at the
        others: if the host has lost its power, the server is started.
        """
        try:
            instance.refresh()
            if instance.host == manager.host:
                manager._init_instance(context, instance)
        except exception.InstanceNotFound:
            LOG.debug('It was deleted', instance=instance)
        except Exception:
            # It would end the thread; the manager says as much and goes on.
            LOG.exception('It cannot be looked at', instance=instance)
