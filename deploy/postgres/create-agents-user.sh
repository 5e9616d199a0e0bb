#!/bin/sh
# Creates the agents' user and database in the bundled Postgres on its first start. The user owns the database and is not a
# superuser. The image runs every script in /docker-entrypoint-initdb.d once, as the superuser and before it accepts other
# connections. Variables: DB_USER, DB_PASSWORD and DB_NAME of the agents; PAGE_DB_USER and PAGE_DB_PASSWORD of the status page,
# whose user `init --reader` lets read the state; POSTGRES_USER, the superuser.
set -eu

: "${DB_PASSWORD:?DB_PASSWORD is empty; set it in env}"
psql -v ON_ERROR_STOP=1 --no-psqlrc --quiet --username "$POSTGRES_USER" --dbname postgres <<'SQL'
-- From the environment, because other processes can see the command line.
\set user `printf '%s' "$DB_USER"`
\set password `printf '%s' "$DB_PASSWORD"`
\set database `printf '%s' "$DB_NAME"`
CREATE ROLE :"user" LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE PASSWORD :'password';
SELECT format('CREATE DATABASE %I OWNER %I', :'database', :'user')
WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = :'database')
\gexec
SELECT format('ALTER DATABASE %I OWNER TO %I', :'database', :'user')
\gexec
\set page_user `printf '%s' "${PAGE_DB_USER:-}"`
\set page_password `printf '%s' "${PAGE_DB_PASSWORD:-}"`
SELECT format('CREATE ROLE %I LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE PASSWORD %L', :'page_user', :'page_password')
WHERE :'page_user' <> ''
\gexec
SQL
