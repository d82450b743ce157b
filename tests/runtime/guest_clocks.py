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

"""Runs in a guest: every way to wait, each in a process of its own.

Each writes one line to <directory>/<name> when its waiting ends: when it
should have ended, when it did (both CLOCK_REALTIME), and what came of it.
The clocks' watcher writes to <directory>/watch_clocks how often a clock went
back, and for how long nothing ran here at all.
"""

import ctypes
import errno
import json
import os
import pathlib
import select
import signal
import sys
import time

DIRECTORY = pathlib.Path(sys.argv[1])
SECONDS = float(sys.argv[2])
SYS = {'nanosleep': 35, 'clock_nanosleep': 230, 'futex': 202, 'semop': 65,
       'poll': 7, 'timer_create': 222, 'timer_settime': 223}

#: Seconds without a step of the watcher in which nothing ran.
STALL = 0.1

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


class Timespec(ctypes.Structure):
    _fields_ = [('s', ctypes.c_long), ('n', ctypes.c_long)]


class Itimerspec(ctypes.Structure):
    _fields_ = [('interval', Timespec), ('value', Timespec)]


def spec(seconds):
    return Timespec(int(seconds), int(seconds % 1 * 1e9))


def call(name, *arguments):
    result = libc.syscall(SYS[name], *arguments)
    return errno.errorcode[ctypes.get_errno()] if result < 0 else result


def nanosleep_rest():
    rest = Timespec()
    return call('nanosleep', ctypes.byref(spec(SECONDS)), ctypes.byref(rest))


def nanosleep_same():
    both = spec(SECONDS)
    return call('nanosleep', ctypes.byref(both), ctypes.byref(both))


def nanosleep_null():
    return call('nanosleep', ctypes.byref(spec(SECONDS)), None)


def clock_nanosleep_null():
    return call('clock_nanosleep', 1, 0, ctypes.byref(spec(SECONDS)), None)


def clock_nanosleep_boottime():
    rest = Timespec()
    return call('clock_nanosleep', 7, 0, ctypes.byref(spec(SECONDS)),
                ctypes.byref(rest))


def clock_nanosleep_absolute():
    until = spec(time.clock_gettime(time.CLOCK_MONOTONIC) + SECONDS)
    return call('clock_nanosleep', 1, 1, ctypes.byref(until), None)


def clock_nanosleep_realtime():
    until = spec(time.time() + SECONDS)
    return call('clock_nanosleep', 0, 1, ctypes.byref(until), None)


def poll_finite():
    return call('poll', None, 0, int(SECONDS * 1000))


def poll_pipe():
    # A real wait, that something else ends.
    read, write = os.pipe()
    if os.fork() == 0:
        time.sleep(SECONDS)
        os.write(write, b'x')
        os._exit(0)
    poller = (ctypes.c_int * 2)(read, select.POLLIN)
    return call('poll', poller, 1, -1)


def _epoll(e, timeout):
    """As programs have to: signal(7) says that being stopped interrupts it.

    :returns: what it returned, and how often it was interrupted
    """
    events = ctypes.create_string_buffer(64)
    end = time.monotonic() + timeout
    interrupted = 0
    while True:
        left = -1 if timeout < 0 else int(
            max(end - time.monotonic(), 0) * 1000 + 1)
        result = libc.epoll_wait(e.fileno(), events, 4, left)
        if result >= 0:
            return result, interrupted
        interrupted += 1


def epoll_wait():
    with select.epoll() as e:
        return _epoll(e, SECONDS)


def epoll_endless():
    read, write = os.pipe()
    if os.fork() == 0:
        time.sleep(SECONDS)
        os.write(write, b'x')
        os._exit(0)
    with select.epoll() as e:
        e.register(read, select.EPOLLIN)
        return _epoll(e, -1)


def select_call():
    select.select([], [], [], SECONDS)
    return 0


def futex_absolute():
    word = ctypes.c_int(0)
    until = spec(time.clock_gettime(time.CLOCK_MONOTONIC) + SECONDS)
    return call('futex', ctypes.byref(word), 9 | 128, 0,
                ctypes.byref(until), None, -1)


def futex_relative():
    # As every user of it has to: until the time is over.
    word = ctypes.c_int(0)
    end = time.monotonic() + SECONDS
    result = 0
    while (left := end - time.monotonic()) > 0 and result == 0:
        result = call('futex', ctypes.byref(word), 128, 0,
                      ctypes.byref(spec(left)))
    return result


def _timerfd(clock, absolute, interval=0.0):
    fd = libc.timerfd_create(clock, 0)
    value = SECONDS
    if absolute:
        value += time.clock_gettime(clock)
    libc.timerfd_settime(fd, int(absolute), ctypes.byref(
        Itimerspec(spec(interval), spec(value))), None)
    return fd


def _read(fd):
    return int.from_bytes(os.read(fd, 8), 'little')


def timerfd_relative():
    return _read(_timerfd(time.CLOCK_MONOTONIC, False)) - 1


def timerfd_absolute():
    return _read(_timerfd(time.CLOCK_MONOTONIC, True)) - 1


def timerfd_boottime():
    return _read(_timerfd(time.CLOCK_BOOTTIME, True)) - 1


def timerfd_realtime():
    return _read(_timerfd(time.CLOCK_REALTIME, True)) - 1


def _signalled(start):
    signal.signal(signal.SIGALRM, lambda *_: None)
    kept = start()
    signal.pause()
    return 0 if kept is not None else 1


def setitimer():
    return _signalled(
        lambda: signal.setitimer(signal.ITIMER_REAL, SECONDS) or True)


def _timer_create(clock, flags, value):
    timer = ctypes.c_int()
    call('timer_create', clock, None, ctypes.byref(timer))
    wanted = Itimerspec(Timespec(), spec(value))
    call('timer_settime', timer, flags, ctypes.byref(wanted), None)
    return timer


def timer_relative():
    return _signalled(lambda: _timer_create(1, 0, SECONDS))


def timer_absolute():
    return _signalled(lambda: _timer_create(
        1, 1, time.clock_gettime(time.CLOCK_MONOTONIC) + SECONDS))


#: These may be late by the time that the guest stood still.
WAITS = [
    nanosleep_rest, nanosleep_same, nanosleep_null, clock_nanosleep_null,
    clock_nanosleep_boottime, clock_nanosleep_absolute,
    clock_nanosleep_realtime, poll_finite, poll_pipe, epoll_wait,
    epoll_endless, select_call, futex_absolute, futex_relative,
    timerfd_relative, timerfd_absolute, timerfd_boottime, timerfd_realtime,
    setitimer, timer_relative, timer_absolute,
]


def watch_clocks():
    went_back, steps, longest, stood = [], 0, {}, 0.0
    last = {c: time.clock_gettime(c) for c in (
        time.CLOCK_MONOTONIC, time.CLOCK_BOOTTIME)}
    seen = time.time()
    end = seen + SECONDS
    # The others may end later, and what holds them up is of interest.
    while (now := time.time()) < end or any(
            not (DIRECTORY / wait.__name__).exists() for wait in WAITS):
        # This one asks for so little that it runs when anybody does.
        if now - seen > STALL:
            stood += now - seen
        seen = now
        for clock, before in last.items():
            now = time.clock_gettime(clock)
            if now < before:
                went_back.append([clock, before, now])
            longest[clock] = max(longest.get(clock, 0), now - before)
            last[clock] = now
        steps += 1
        time.sleep(0.001)
    return {'back': went_back, 'steps': steps, 'longest': longest,
            'stood': stood}


def run(wait):
    began = time.time()
    result = wait()
    ended = time.time()
    path = DIRECTORY / wait.__name__
    path.with_suffix('.new').write_text(json.dumps({
        'wanted': began + SECONDS, 'ended': ended, 'result': result}))
    path.with_suffix('.new').rename(path)


def main():
    DIRECTORY.mkdir(exist_ok=True)
    for wait in [*WAITS, watch_clocks]:
        if os.fork() == 0:
            run(wait)
            os._exit(0)
    (DIRECTORY / 'started').touch()
    while True:
        try:
            os.wait()
        except ChildProcessError:
            break


main()
