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

"""Live migration: the source's side."""

import threading
import time

from nova.compute import task_states
from nova.compute import utils as compute_utils
from nova import context as nova_context
from nova import exception
from nova.i18n import _
from nova import objects
from oslo_log import log as logging

from nova_pycontainer import attachments
from nova_pycontainer import errors as driver_errors
from nova_pycontainer import flavor
from nova_pycontainer import handover
from nova_pycontainer import migration_data
from nova_pycontainer import migration_destination
from nova_pycontainer import power
from nova_pycontainer.runtime import errors
from nova_pycontainer import stale

LOG = logging.getLogger(__name__)

#: Seconds between two looks at a migration; its end is seen at once.
_POLL_S = 0.5
#: Seconds between two attempts to reach an agent that is gone.
_RETRY_S = 1.0
#: Seconds between two records of the progress in Nova's database.
_SAVE_S = 2.0
#: Seconds between two lines in the log that tell how far it is.
_LOG_S = 30.0

#: As in the libvirt driver, where less memory gets no less time.
_LEAST_MEMORY_GIB = 2

#: Nova's name for a migration that cannot be aborted any more because the
#: guest runs on the destination while its memory follows.
POST_COPY = 'running (post-copy)'

#: Characters of a reason, after Nova's "Migration error: ".
_ROOM = 235

#: Event of the server's action that says why a migration failed.
EVENT = 'compute_live_migration_transfer'


#: For a deletion to wait, in seconds. Nova's RPC to the destination is in it.
_ROLL_BACK_TIMEOUT = 120


class Job:
    """One server on its way.

    :param migration: a nova.objects.Migration
    """

    def __init__(self, instance, migration):
        self.instance = instance
        self.migration = migration
        #: Its end was asked for, and the reason.
        self.aborted = None
        #: What failed is undone, on the destination and in Nova's records.
        self.over = threading.Event()


class Source:
    """Sends servers away.

    :param client: client of the agent
    :param conf: the options of ``[pycontainer]``
    :param host: of the service
    :param virtapi: the compute manager's
    """

    def __init__(self, client, conf, host, virtapi):
        self._client = client
        self._conf = conf
        self._host = host
        self._virtapi = virtapi
        self._jobs = {}
        #: Until Nova's records say so.
        self._moved_to = {}
        self._lock = threading.Lock()

    def disk_info(self, instance):
        """What ``pre_live_migration`` has to know: the container, as it is.

        Not as it would be made today: options and image properties may have
        changed since, and the guest goes on as it began.
        """
        info = self._client.info(instance.uuid)
        attachments.remember(nova_context.get_admin_context(), instance)
        return migration_data.dump_disk_info(
            spec=info['spec'], base_id=info['base_id'])

    # The migration

    def migrate(self, context, instance, dest, post_method, recover_method,
                block_migration, data):
        """Move the server, and have Nova told of the end.

        Exactly one of the methods is called, whatever happens; or, if the
        server has moved, what the first one does, see :mod:`.handover`.

        :param dest: host name of the destination's service
        """
        self._move(context, instance, dest, post_method, recover_method,
                   block_migration, data, begin=True)

    def resume(self, context, instance, dest, post_method, recover_method,
               data):
        """Go on with a migration that the agent may have begun already.

        Otherwise like :meth:`migrate`.
        """
        self._move(context, instance, dest, post_method, recover_method,
                   data.block_migration, data, begin=False)

    def _move(self, context, instance, dest, post_method, recover_method,
              block_migration, data, *, begin):
        job = Job(instance, data.migration)
        with self._lock:
            self._jobs[instance.uuid] = job
        try:
            self._moved(context, job, dest, post_method, recover_method,
                        block_migration, data, begin)
        finally:
            self._forget(job)
            job.over.set()

    def _moved(self, context, job, dest, post_method, recover_method,
               block_migration, data, begin):
        error = None
        if begin:
            error = self._begun(context, job, dest, data)
        if error is None:
            error = self.watch(job)
        if error is None:
            with self._lock:
                self._moved_to[job.instance.uuid] = dest
            # What this does with the server here must not wait for itself.
            self._forget(job)
            try:
                handover.Handover(
                    context, job.instance, data.migration, post_method,
                    (context, job.instance, dest, block_migration,
                     data)).finish()
            except exception.MigrationError as e:
                self._record(context, job.instance, e)
                raise
            finally:
                with self._lock:
                    del self._moved_to[job.instance.uuid]
        else:
            self._recover(context, job, dest, recover_method, data, error)

    def _forget(self, job):
        with self._lock:
            self._jobs.pop(job.instance.uuid, None)

    def _begun(self, context, job, dest, data):
        """Have the agent begin.

        :returns: None, or the exception that says why it has not
        """
        try:
            if stale.given_up(job.instance):
                raise exception.MigrationError(
                    reason=_('nova-compute was restarted before it began. '
                             'Ask for it again'))
            self._begin(context, job, dest, data)
        except exception.NovaException as e:
            LOG.error('The migration could not begin: %s', e,
                      instance=job.instance)
            return e
        except Exception as e:
            LOG.exception('The migration could not begin',
                          instance=job.instance)
            return exception.MigrationError(reason=str(e))
        return None

    def _begin(self, context, job, dest, data):
        facts = migration_data.get(data)
        if facts['migration'] != job.migration.uuid:
            raise exception.MigrationError(
                reason=_('the destination expects another migration'))
        endpoint = facts['endpoint']
        # Who the other agent is, the database says; where it can be reached,
        # the agent itself.
        identity = migration_data.recorded_identity(context, dest)
        if identity['fingerprint'] != endpoint['fingerprint']:
            raise exception.MigrationError(
                reason=_('the agent of %s has another certificate than the '
                         'record of that compute node says. If it has got a '
                         'new one, try again in a minute') % dest)
        try:
            self._client.migration_begin(
                job.instance.uuid, job.migration.uuid,
                {**identity, **endpoint},
                migration_destination.options(self._conf))
        except errors.AgentUnavailable as e:
            # Whether it has begun, it will know when it is back.
            LOG.warning('%s', e, instance=job.instance)
        except errors.ContainerError as e:
            raise _failed(e) from e

    def watch(self, job):
        """Follow a migration until its end.

        :returns: None if the server runs on the destination; the exception
            that says why it runs here, if it does
        """
        began = last_saved = last_logged = time.monotonic()
        limit = self._time_limit(job.instance)
        acted = False
        memory = self._memory(job.instance)
        while True:
            status = self._status(job)
            now = time.monotonic()
            if status['phase'] in ('completed', 'aborted', 'failed'):
                self._save(job, status, memory)
                return self._outcome(job, status)
            if now - last_saved >= _SAVE_S or status['phase'] == 'running':
                self._save(job, status, memory)
                last_saved = now
            if now - last_logged >= _LOG_S:
                LOG.info('The migration runs for %d s: %s',
                         now - began, status, instance=job.instance)
                last_logged = now
            if limit and now - began > limit and not acted:
                acted = self._late(job, limit)

    def _status(self, job):
        """What the agent says, which is waited for as long as it takes.

        Nobody else knows where the server runs.
        """
        warned = False
        while True:
            try:
                return self._client.migration_status(
                    job.migration.uuid, _POLL_S)
            except errors.AgentUnavailable as e:
                if not warned:
                    LOG.warning('The migration goes on without being '
                                'watched: %s', e, instance=job.instance)
                warned = True
            except errors.ContainerError as e:
                if e.code == 'not_found':
                    return self._forgotten(job)
                LOG.warning('%s', e, instance=job.instance)
            time.sleep(_RETRY_S)

    def _forgotten(self, job):
        """The agent was restarted: it knows how it ended by what there is.
        """
        error = {'code': 'aborted', 'message': 'the migration ended with '
                 'the agent of the source'}
        try:
            info = self._client.info(job.instance.uuid)
        except errors.AgentUnavailable:
            time.sleep(_RETRY_S)
            return {'phase': 'unknown'}
        except errors.ContainerError as e:
            if e.code == 'not_found' and self._is_wanted(job.instance):
                # A source that keeps a server keeps its container. It has
                # moved, and what was left here is removed.
                return {'phase': 'completed', 'error': None}
            return {'phase': 'failed', 'error': e.to_dict()}
        if info.get('moved'):
            return {'phase': 'completed', 'error': None}
        return {'phase': 'failed', 'error': error}

    @staticmethod
    def _is_wanted(instance):
        """Whether Nova has it, and does not delete it."""
        try:
            instance.refresh()
        except exception.InstanceNotFound:
            return False
        return instance.task_state == task_states.MIGRATING

    @staticmethod
    def _outcome(job, status):
        if status['phase'] == 'completed':
            LOG.info('The server has moved: %s', status,
                     instance=job.instance)
            return None
        error = errors.ContainerError.from_dict(status['error'] or {
            'code': 'internal', 'message': 'the migration failed'})
        LOG.error('The server could not be moved and goes on here: %s', error,
                  instance=job.instance)
        if job.aborted is not None and error.code == 'aborted':
            return Cancelled(reason=job.aborted)
        return _failed(error)

    def _recover(self, context, job, dest, recover_method, data, error):
        instance = job.instance
        status = {}
        if isinstance(error, Cancelled):
            status['migration_status'] = 'cancelled'
        self._record(context, instance, error)
        try:
            recover_method(context, instance, dest, data, **status)
            if attachments.forget(instance):
                instance.save()
        except exception.InstanceNotFound:
            # It was deleted meanwhile, which ended the migration.
            LOG.info('The server was deleted while it migrated',
                     instance=instance)
        except exception.UnexpectedTaskStateError as e:
            # It is being deleted, or a restart of this service has given the
            # request up. All is cleaned up by now, only that the server does
            # not migrate could not be noted, and should not.
            LOG.info('It could not be noted that the migration is over: %s',
                     e, instance=instance)
            job.migration.status = status.get('migration_status', 'failed')
            job.migration.save()
            self._drop_context(instance)

    @staticmethod
    def _drop_context(instance):
        """Of what the destination had claimed."""
        try:
            instance.refresh()
            instance.drop_migration_context()
            attachments.forget(instance)
            instance.save()
        except exception.NovaException as e:
            LOG.info('%s', e, instance=instance)

    def _record(self, context, instance, error):
        """Let the reason be seen by others than readers of the log.

        Nova's own record of a migration has no room for one. The action of
        the server has ("openstack server event show").
        """
        try:
            objects.InstanceActionEvent.event_start(
                context, instance.uuid, EVENT, want_result=False,
                host=self._host)
            objects.InstanceActionEvent.event_finish_with_failure(
                context, instance.uuid, EVENT,
                exc_val=error.format_message(), exc_tb='',
                want_result=False)
            compute_utils.add_instance_fault_from_exc(
                context, instance, error, (type(error), error, None))
        except Exception as e:
            LOG.warning('Cannot record why the migration failed: %s', e,
                        instance=instance)

    # What goes on meanwhile

    def _memory(self, instance):
        try:
            return self._client.info(instance.uuid)['memory_bytes']
        except errors.ContainerError:
            return None

    def _time_limit(self, instance):
        gib = (max(instance.flavor.memory_mb / 1024, _LEAST_MEMORY_GIB) +
               flavor.disk_gb(instance.flavor))
        return self._conf.live_migration_completion_timeout * gib

    def _late(self, job, limit):
        """The operator's action for a migration that takes too long.

        :returns: whether the agent has heard it
        """
        LOG.warning('The migration has not completed within %d s', limit,
                    instance=job.instance)
        try:
            if self._conf.live_migration_timeout_action == 'force_complete':
                self._client.migration_force_complete(job.migration.uuid)
            else:
                self._abort(job, _('it has not completed within %d s') %
                            limit)
        except errors.ContainerError as e:
            # Too late, in the other sense; or it is seen at the next look.
            LOG.warning('%s', e, instance=job.instance)
            return e.code not in ('agent_unavailable', 'timeout')
        return True

    @staticmethod
    def _save(job, status, memory):
        """Write how far it is to Nova's database."""
        migration, instance = job.migration, job.instance
        sent = status.get('memory_sent') or 0
        total = max(status.get('memory_total') or memory or 0, sent)
        # No zeros: the API's schema knows numbers from 1 on, and nothing.
        migration.memory_total = total or None
        migration.memory_processed = sent or None
        migration.memory_remaining = total - sent or None
        migration.disk_processed = (
            (status.get('disk_sent') or 0) +
            (status.get('layer_sent') or 0)) or None
        if status['phase'] == 'running' and (
                status.get('strategy') == 'post-copy'):
            migration.status = POST_COPY
        try:
            migration.save()
            instance.progress = 100 * sent // total if total else 0
            instance.save()
        except Exception as e:
            # It goes on all the same. A server may have been deleted.
            LOG.debug('Cannot save the progress of the migration: %s', e,
                      instance=instance)

    # What others ask for

    def job(self, instance):
        """:raises nova.exception.NoActiveMigrationForInstance:"""
        with self._lock:
            job = self._jobs.get(instance.uuid)
        if job is None:
            raise exception.NoActiveMigrationForInstance(
                instance_id=instance.uuid)
        return job

    def force_complete(self, instance):
        job = self.job(instance)
        with driver_errors.translated(
                instance, failure=exception.MigrationError):
            self._client.migration_force_complete(job.migration.uuid)

    def is_here(self, instance):
        """Whether it lives here, whatever Nova takes it for."""
        info = self._client.find(instance.uuid)
        here = info is not None and not info['moved'] and (
            info['state'] in power.ALIVE)
        if here:
            LOG.error('It has come back, or never left: it is %s here, and is '
                      'not cleaned up', info['state'], instance=instance)
        return here

    def deleted(self, context, instance):
        """The server is deleted: end its migration first, if there is one.

        Nova's roll-back gives back what it holds on the destination. Were the
        server's allocations deleted meanwhile, it would fail before that.

        :raises nova.exception.InstanceNotFound: it has gone to another host,
            which deletes it
        """
        self._end(instance)
        host = self._where(context, instance)
        if host != self._host:
            handover.delete_at(
                context, self._virtapi._compute, instance, host)
            raise exception.InstanceNotFound(instance_id=instance.uuid)

    def _where(self, context, instance):
        if instance.task_state != task_states.DELETING:
            return self._host
        with self._lock:
            if instance.uuid in self._moved_to:
                return self._moved_to[instance.uuid]
        try:
            info = self._client.find(instance.uuid)
        except errors.ContainerError as e:
            # Who asks it to delete the container will say so.
            LOG.debug('%s', e, instance=instance)
            return self._host
        if info is not None and not info['moved']:
            return self._host
        try:
            now = objects.Instance.get_by_uuid(context, instance.uuid)
        except exception.InstanceNotFound:
            return self._host
        return now.host or self._host

    def _end(self, instance):
        with self._lock:
            job = self._jobs.get(instance.uuid)
        if job is None:
            return
        try:
            self._client.migration_abort(
                job.migration.uuid, 'the instance is deleted')
        except errors.ContainerError as e:
            # It is too late, or there is nobody to ask: the agent settles
            # that when it deletes the container.
            LOG.info('The migration cannot be aborted: %s', e,
                     instance=instance)
            return
        if not job.over.wait(_ROLL_BACK_TIMEOUT):
            LOG.warning('The migration of the deleted server is not rolled '
                        'back after %d s', _ROLL_BACK_TIMEOUT,
                        instance=instance)

    def abort(self, instance):
        """End the migration; returns when the agent has ended it.

        :raises nova.exception.InvalidMigrationState: it is too late
        """
        job = self.job(instance)
        try:
            self._abort(job, _('it was aborted by the operator'))
        except errors.ContainerError as e:
            if e.code != 'bad_state':
                raise driver_errors.to_nova(
                    e, failure=exception.MigrationError) from e
            raise exception.InvalidMigrationState(
                migration_id=job.migration.id, instance_uuid=instance.uuid,
                state=_('past the point of no return'),
                method='abort live migration') from e

    def _abort(self, job, reason):
        job.aborted = reason
        try:
            self._client.migration_abort(job.migration.uuid, reason)
        except errors.ContainerError as e:
            if e.code == 'bad_state':
                job.aborted = None
            raise


class Cancelled(exception.MigrationError):
    """It was asked to end. Never crosses an RPC."""

    msg_fmt = _('The migration was cancelled: %(reason)s')


def _failed(error):
    """The exception that says why, in the 255 characters that Nova keeps.

    CRIU's words are what tells the operator what to do; the remedy gives way
    to them.
    """
    text = error.message
    if error.uuid:
        text = text.replace(f'instance {error.uuid}: ', '')
    if error.cause and error.cause not in text:
        text += f': {error.cause}'
    if error.remedy and len(text) + len(error.remedy) + 2 <= _ROOM:
        text += f'. {error.remedy}'
    return exception.MigrationError(reason=driver_errors.clip(text, _ROOM))
