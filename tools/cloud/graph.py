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

"""Runs steps in parallel, as far as their dependencies permit."""

import concurrent.futures
import os
import sys
import threading
import time
import typing

T0 = float(os.environ.get('SETUP_T0') or time.time())
_lock = threading.Lock()


def say(text: str) -> None:
    with _lock:
        print(f'[{time.time() - T0:4.0f}s] {text}', flush=True)


class Graph:
    """Steps by name; a step starts when all that it needs is done."""

    def __init__(self) -> None:
        self._steps: dict[str, tuple[typing.Callable, tuple[str, ...]]] = {}

    def add(self, name: str, call: typing.Callable[[], None],
            *needs: str) -> None:
        unknown = [need for need in needs if need not in self._steps]
        if unknown:
            raise ValueError(f'{name} needs unknown steps {unknown}')
        self._steps[name] = (call, needs)

    def _run(self, name: str) -> None:
        began = time.monotonic()
        self._steps[name][0]()
        took = time.monotonic() - began
        if took >= 0.05:
            say(f'{name}: {took:.1f} s')

    def run(self, workers: int = 12) -> None:
        """Runs all steps; raises the first failure once others have ended."""
        waiting = dict(self._steps)
        done: set[str] = set()
        failure: BaseException | None = None
        running: dict[concurrent.futures.Future, str] = {}
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            while waiting or running:
                if failure is None:
                    for name in [name for name, (_, needs) in waiting.items()
                                 if done.issuperset(needs)]:
                        del waiting[name]
                        running[pool.submit(self._run, name)] = name
                if not running:
                    break
                ended, _ = concurrent.futures.wait(
                    running, timeout=10,
                    return_when=concurrent.futures.FIRST_COMPLETED)
                if not ended:
                    say('still at: ' + ', '.join(sorted(running.values())))
                for future in ended:
                    name = running.pop(future)
                    error = future.exception()
                    if error is None:
                        done.add(name)
                    elif failure is None:
                        failure = error
                        print(f'[{time.time() - T0:4.0f}s] {name}: FAILED',
                              file=sys.stderr, flush=True)
        if failure is not None:
            raise failure
