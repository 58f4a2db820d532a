"""The model service: an OpenAI-compatible HTTP server over the stream engine. Needs the extra `serve`.

Read `app.py` for the routes, `scheduler.py` for how requests share the engine, `chats.py` for messages and tool calls.
"""

from rome.rollout.service.app import ServiceConfig, make_app
from rome.rollout.service.chats import ChatFormat, RomeChat, TemplateChat
from rome.rollout.service.errors import ServiceError
from rome.rollout.service.scheduler import Scheduler
from rome.rollout.service.server import ServerConfig, serve

__all__ = [
    "ChatFormat",
    "RomeChat",
    "Scheduler",
    "ServerConfig",
    "ServiceConfig",
    "ServiceError",
    "TemplateChat",
    "make_app",
    "serve",
]
