"""The job of conversations: computes the score of one that has ended."""

from app.conversations import repository
from app.conversations.schemas import ENDED, ConversationEnded, Score
from app.conversations.scores import compute_score
from app.jobs.consume import consume
from app.jobs.handlers import PoisonError, Run, handlers


# Other services end conversations by a message; the key is that of the request.
@consume("conversation-ended", ENDED, ConversationEnded, key="conversation_id")
@handlers.add(ENDED, ConversationEnded, attempts=5, timeout_seconds=60)
async def compute(run: Run, ended: ConversationEnded) -> None:
    """Read the lines, compute in a process, store the score: once, with the end of the job."""
    async with run.database.acquire() as connection:
        lines = await repository.list_lines(connection, ended.conversation_id)
    if not lines:
        raise PoisonError("there is no such conversation")
    score = await run.processes.run(compute_score, lines)
    async with run.done(Score(score=score)) as connection:
        await repository.store_score(connection, ended.conversation_id, score)
