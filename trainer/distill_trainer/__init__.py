"""Train students on a teacher's cached next-token distributions; ask the live teacher where the cache has no answer."""
