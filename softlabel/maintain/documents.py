"""The data of a store of tokens as the documents that were labelled."""

from softlabel.common.spec import parse_spec
from softlabel.dataset import Source
from softlabel.dataset.tokenize import tokenize_source
from softlabel.errors import MismatchError, SpecError
from softlabel.inputs.chat import CHATS
from softlabel.inputs.tokenizer import Tokenizer
from softlabel.inputs.tokens import TOKENS
from softlabel.inputs.vocabulary import Vocabulary, read_vocabulary
from softlabel.store.reader import Store


def tokenize_as_stored(source: Source, store: Store) -> Source:
    """Tokenise data with the tokenizer and the length of a store; data of any other store stay as they are.

    Raises:
        MismatchError: the store has no tokenizer, or the chat template of its teacher is not there any more.
        SpecError, DataError: as `tokenize_source`.
    """
    tokens = store.run.tokens
    if tokens is None:
        return source
    return tokenize_source(source, _find_vocabulary(source, store), max_length=tokens.max_length)


def _find_vocabulary(source: Source, store: Store) -> Vocabulary:
    if source.inputs == CHATS:  # the template is in the teacher's folder
        teacher = str((store.manifest.recorded.get("teachers") or [""])[0])
        try:
            found = read_vocabulary(parse_spec(teacher).name)
        except (SpecError, OSError) as error:
            raise MismatchError(
                f"{store.url}: chats need the chat template of the teacher, which is not there ({error}); give the "
                "token ids that it made, with '?tokens=COLUMN'"
            ) from error
        assert store.run.tokens is not None
        template = None if found.template is None else found.template.fingerprint
        if (found.fingerprint, template) != (store.run.tokens.tokenizer, store.run.tokens.template):
            raise MismatchError(f"{store.url}: {teacher} has another vocabulary or chat template than when it labelled")
        return found
    if (content := store.tokenizer) is None and source.inputs == TOKENS:
        raise MismatchError(
            f"{store.url}: has no tokenizer, by whose vocabulary token ids are checked; compare them with "
            "--recompute, which takes the teacher's"
        )
    if content is None:
        raise MismatchError(
            f"{store.url}: has no tokenizer, so that its documents cannot be compared with texts; give token ids, with "
            "'?tokens=COLUMN'"
        )
    return Vocabulary(Tokenizer(content))
