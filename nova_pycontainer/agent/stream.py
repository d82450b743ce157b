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

"""A snapshot as it comes from the agent: a file to be read once."""

import http.client
import types
import typing as ty

from nova_pycontainer.runtime import errors

TYPE: ty.Final = 'application/x-tar'


class Stream:
    """An archive. It ends only where all of it has come.

    :param connection: closed along with it
    """

    def __init__(
        self, connection: http.client.HTTPConnection,
        response: http.client.HTTPResponse, uuid: str,
    ) -> None:
        self._connection = connection
        self._response = response
        self._uuid = uuid

    def read(self, size: int = -1) -> bytes:
        """:raises ContainerError: ``aborted``: the agent has given it up, or
            has gone away
        """
        try:
            return self._response.read(None if size < 0 else size)
        except (OSError, http.client.HTTPException) as e:
            raise errors.ContainerError(
                'aborted', 'the snapshot was cut off', uuid=self._uuid,
                cause=str(e) or type(e).__name__,
                remedy='See the log of pycontainer-agent on that host') from e

    def close(self) -> None:
        """Without having read all of it this gives the snapshot up."""
        self._response.close()
        self._connection.close()

    def __enter__(self) -> 'Stream':
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: types.TracebackType | None,
    ) -> None:
        self.close()
