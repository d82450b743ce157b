/* Licensed under the Apache License, Version 2.0 (the "License"); you may
 * not use this file except in compliance with the License. You may obtain
 * a copy of the License at
 *
 *     http://www.apache.org/licenses/LICENSE-2.0
 *
 * Unless required by applicable law or agreed to in writing, software
 * distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
 * WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
 * License for the specific language governing permissions and limitations
 * under the License.
 *
 * A database and its client, for a guest of the matrix of faults.
 *
 *   ledger run DATABASE LOG   one row in one transaction, for ever; what has
 *                             been committed is said in LOG
 *   ledger check DATABASE     what is wrong with it, and all of its rows
 */

#include <fcntl.h>
#include <sqlite3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static sqlite3 *db;

static void fail(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, sqlite3_errmsg(db));
    exit(1);
}

static void execute(const char *sql)
{
    if (sqlite3_exec(db, sql, NULL, NULL, NULL) != SQLITE_OK)
        fail(sql);
}

static sqlite3_stmt *prepare(const char *sql)
{
    sqlite3_stmt *made;

    if (sqlite3_prepare_v2(db, sql, -1, &made, NULL) != SQLITE_OK)
        fail(sql);
    return made;
}

/* A random one of the kernel's. */
static void random_value(char value[37])
{
    int fd = open("/proc/sys/kernel/random/uuid", O_RDONLY);

    if (fd < 0 || read(fd, value, 36) != 36)
        fail("uuid");
    close(fd);
    value[36] = 0;
}

static void run(const char *log)
{
    int fd = open(log, O_WRONLY | O_CREAT | O_APPEND, 0644);
    char value[37], line[80];
    sqlite3_stmt *insert;

    if (fd < 0)
        fail(log);
    execute("PRAGMA journal_mode=WAL");
    execute("PRAGMA synchronous=FULL");
    /* So that there are some while it moves. */
    execute("PRAGMA wal_autocheckpoint=32");
    execute("CREATE TABLE ledger (number INTEGER PRIMARY KEY, value TEXT)");
    insert = prepare("INSERT INTO ledger (value) VALUES (?)");
    for (;;) {
        random_value(value);
        execute("BEGIN IMMEDIATE");
        sqlite3_bind_text(insert, 1, value, -1, SQLITE_STATIC);
        if (sqlite3_step(insert) != SQLITE_DONE)
            fail("insert");
        sqlite3_reset(insert);
        execute("COMMIT");
        snprintf(line, sizeof line, "%lld %s\n",
                 (long long)sqlite3_last_insert_rowid(db), value);
        if (write(fd, line, strlen(line)) != (ssize_t)strlen(line))
            fail(log);
        usleep(50000);
    }
}

static void check(void)
{
    sqlite3_stmt *query = prepare("PRAGMA integrity_check");

    while (sqlite3_step(query) == SQLITE_ROW)
        printf("%s\n", (const char *)sqlite3_column_text(query, 0));
    sqlite3_finalize(query);
    query = prepare("SELECT number, value FROM ledger ORDER BY number");
    while (sqlite3_step(query) == SQLITE_ROW)
        printf("%lld %s\n", (long long)sqlite3_column_int64(query, 0),
               (const char *)sqlite3_column_text(query, 1));
    sqlite3_finalize(query);
}

int main(int argc, char **argv)
{
    if (argc < 3 || sqlite3_open(argv[2], &db) != SQLITE_OK)
        fail("usage");
    sqlite3_busy_timeout(db, 10000);
    if (!strcmp(argv[1], "run") && argc == 4)
        run(argv[3]);
    else
        check();
    return sqlite3_close(db) != SQLITE_OK;
}
