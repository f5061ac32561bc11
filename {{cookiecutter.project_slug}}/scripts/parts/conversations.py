"""The example of jobs: what `make remove-conversations` removes, or edits."""

#: Its name in messages.
TITLE = "the conversations"
#: The parts that need this one, and are removed with it.
ALONG = ()
#: The directories that have no files but these.
DIRECTORIES = ["app/conversations", "tests/conversations"]
PATHS = [
    "app/conversations/__init__.py",
    "app/conversations/errors.py",
    "app/conversations/jobs.py",
    "app/conversations/repository.py",
    "app/conversations/router.py",
    "app/conversations/schemas.py",
    "app/conversations/scores.py",
    "app/conversations/service.py",
    "migrations/versions/0004_conversations.py",
    "tests/conversations/__init__.py",
    "tests/conversations/factory.py",
    "tests/conversations/test_conversations.py",
    "tests/conversations/test_jobs.py",
    "tests/conversations/test_scores.py",
]
#: The files of other parts that need this one as well, and are removed with it.
DEPENDENTS = ()
#: The files that move to docs/patterns, where `make pattern` finds them.
MOVED = ()
#: The tables that its migrations create.
TABLES = ["conversations", "conversation_lines"]
#: Files with blocks between `conversations: begin` and `conversations: end`, or with marked rows.
FILES_WITH_BLOCKS = ["Makefile", "README.md", "docs/jobs.md", "tests/scripts/test_tune.py"]
#: The marked lines of code. Other lines that end in `# conversations` are the team's.
LINES = {
    "app/__init__.py": [
        "conversations/       a feature with a job  # conversations",
        "    router.py  service.py  repository.py  schemas.py  errors.py  # conversations",
        "    jobs.py  scores.py  # conversations",
    ],
    "app/jobs_main.py": [
        "from app.conversations import jobs as conversations  # conversations",
        "JOBS += [conversations]  # conversations",
    ],
    "app/main.py": [
        "from app.conversations.router import router as conversations_router  # conversations",
        "    app.include_router(conversations_router)  # conversations",
    ],
    "pyproject.toml": ['    "(conversations)", # conversations'],
    "tests/scripts/test_tune.py": ["import re  # conversations"],
}
