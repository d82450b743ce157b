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

"""Encrypted volumes: dm-crypt on this host, by os-brick's encryptors.

The guest has a device of what is decrypted, and never the key. nova-compute
gets that from the key manager, with the rights of whoever has asked for what
is done.
"""

import functools

from castellan import key_manager
from nova import exception
from nova import utils
from nova.volume import cinder
from os_brick import encryptors
from os_brick.encryptors import luks
from os_brick import exception as brick_exception
from oslo_concurrency import processutils
from oslo_config import cfg

#: Where os-brick makes the names that an encryptor may let point elsewhere.
_OWN = '/dev/disk/by-id/os-brick'


class Encryption:
    """The encrypted volumes of one host."""

    def __init__(self):
        self._api = cinder.API()

    @functools.cached_property
    def _keys(self):
        return key_manager.API(cfg.CONF)

    def open(self, context, ident, connection_info, metadata=None):
        """Let the path of a connected volume be what is decrypted.

        :param ident: the volume's
        :param metadata: what Cinder says of the encryption; None: it is asked
        :raises nova.exception.NovaException: it cannot be had
        """
        if not _is_own(connection_info) or connection_info.get('multiattach'):
            # A link would take the place of the host's own device; and the
            # servers of one host would share what one of them closes.
            raise exception.VolumeEncryptionNotSupported(
                volume_type=connection_info['driver_volume_type'],
                volume_id=ident)
        try:
            metadata = metadata or self._metadata(
                context, ident, connection_info)
            # A nova-compute that was killed may have left it open.
            self.close(connection_info)
            self._encryptor(connection_info, metadata).attach_volume(
                context, **metadata)
        except processutils.ProcessExecutionError as e:
            raise exception.VolumeAttachFailed(
                volume_id=ident, reason=(e.stderr or str(e)).strip()) from e
        except (brick_exception.BrickException, OSError) as e:
            raise exception.VolumeAttachFailed(
                volume_id=ident, reason=str(e)) from e

    def extend(self, context, ident, connection_info):
        """Have what is decrypted follow the size of its volume."""
        metadata = self._metadata(context, ident, connection_info)
        self._encryptor(connection_info, metadata).extend_volume(
            context, **metadata)

    @staticmethod
    def close(connection_info):
        """End :meth:`open`; idempotent.

        :raises processutils.ProcessExecutionError: it is in use
        """
        if not _is_own(connection_info):
            # It was never connected here.
            return
        # How it is encrypted does not matter for that.
        luks.LuksEncryptor(
            utils.get_root_helper(), connection_info, keymgr=None
        ).detach_volume()

    def _metadata(self, context, ident, connection_info):
        return encryptors.get_encryption_metadata(
            context, self._api, ident, connection_info)

    def _encryptor(self, connection_info, metadata):
        return encryptors.get_volume_encryptor(
            utils.get_root_helper(), connection_info, self._keys, **metadata)


def _is_own(connection_info):
    return (connection_info['data'].get('device_path') or '').startswith(_OWN)
