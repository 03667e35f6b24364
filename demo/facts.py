"""What the demo model knows by heart: this server, small talk, and stories. Plain data, no logic.

Each entry: the phrasings of a question that training shows, those that only the
evaluation shows, and the answer.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fact:
    answer: str
    seen: tuple[str, ...]
    unseen: tuple[str, ...]


SERVER = (
    Fact(
        "This is a text generation server. It loads a language model and answers requests over HTTP.",
        (
            "What is this server?",
            "What is this?",
            "What does this server do?",
            "Explain what this server is.",
            "Describe this server.",
            "What kind of server is this?",
            "What is the purpose of this server?",
        ),
        ("Tell me what this server is.", "Describe what this server does.", "What sort of server is this?"),
    ),
    Fact(
        "The server listens on port 3000 unless you pass --port.",
        (
            "Which port does the server use?",
            "What port does this server listen on?",
            "What is the default port?",
            "On which port does it run?",
            "Tell me the port of the server.",
            "Which port is used by default?",
            "What is the port number?",
        ),
        ("What port is it on?", "Which port does this server listen on?", "Tell me the default port."),
    ),
    Fact(
        'POST your request to /generate_stream, or send "stream": true to /v1/chat/completions. '
        "Tokens arrive as server-sent events.",
        (
            "How do I stream tokens?",
            "How can I stream the answer?",
            "How does streaming work?",
            "Can I stream the output?",
            "How do I get a stream of tokens?",
            "Does this server support streaming?",
            "What do I do to stream?",
        ),
        ("How can I stream tokens?", "How do I stream the output?", "Is streaming supported?"),
    ),
    Fact(
        "The main routes are /generate, /generate_stream, /v1/chat/completions, /v1/completions, /tokenize, "
        "/info, /health and /metrics.",
        (
            "Which routes does the server have?",
            "What routes are there?",
            "List the routes.",
            "Which endpoints can I call?",
            "What endpoints does this server have?",
            "Name the routes of the server.",
            "Show me all the routes.",
        ),
        ("What routes does this server have?", "List all endpoints.", "Which routes can I call?"),
    ),
    Fact(
        "GET /health returns status 200 when the server is ready.",
        (
            "How do I check the health of the server?",
            "Is there a health check?",
            "Which route tells if the server is healthy?",
            "How can I tell that the server is ready?",
            "What is the health route?",
            "How do I know if the server is healthy?",
        ),
        (
            "How do I do a health check?",
            "Which route is the health check?",
            "How do I know that the server is ready?",
        ),
    ),
    Fact(
        "GET /metrics returns counters and histograms in the Prometheus format.",
        (
            "Where are the metrics?",
            "How do I read the metrics?",
            "Does the server have Prometheus metrics?",
            "Which route has the metrics?",
            "How can I monitor the server?",
            "What metrics are there?",
        ),
        (
            "Where can I find the metrics?",
            "How do I get Prometheus metrics?",
            "Which route shows the metrics?",
        ),
    ),
    Fact(
        "GET /info returns the model id, the limits and the version of the server.",
        (
            "How do I see which model is loaded?",
            "Which route shows the model info?",
            "What does the info route return?",
            "Where can I see the limits of the server?",
            "How do I find the version of the server?",
            "What is /info for?",
        ),
        ("How can I see which model is loaded?", "What does /info return?", "How do I see the version?"),
    ),
    Fact(
        "POST your text to /tokenize and you get the ids and the text of its tokens.",
        (
            "How do I tokenize text?",
            "How can I count the tokens of a text?",
            "Which route tokenizes text?",
            "Can the server tokenize?",
            "What is /tokenize for?",
            "How do I get token ids?",
        ),
        ("How can I tokenize a text?", "Can I tokenize text?", "How do I count tokens?"),
    ),
    Fact(
        "Yes. Point the OpenAI client at /v1 on this server and use the chat completions or completions API.",
        (
            "Is the server compatible with OpenAI?",
            "Can I use the OpenAI client?",
            "Does it work with the OpenAI library?",
            "How do I use the OpenAI client with this server?",
            "Does this server have an OpenAI API?",
            "Is there an OpenAI route?",
        ),
        ("Is it compatible with the OpenAI client?", "Can I use OpenAI?", "Does the OpenAI API work?"),
    ),
    Fact(
        "Pass --num-shard with the number of shards, for example --num-shard 2.",
        (
            "How do I use several GPUs?",
            "How do I run two shards?",
            "How do I set the number of shards?",
            "Can I split the model over several GPUs?",
            "How can I use more than one shard?",
            "Which option sets the number of shards?",
            "How do I shard the model?",
        ),
        ("How can I use several GPUs?", "What option sets the shards?", "How can I run two shards?"),
    ),
    Fact(
        "Pass --model-id with a Hub id or a local folder.",
        (
            "How do I choose another model?",
            "How do I serve my own model?",
            "How can I load another model?",
            "Which option selects the model?",
            "How do I change the model?",
            "Can I serve a different model?",
        ),
        ("How can I change the model?", "Can I load another model?", "How do I serve a different model?"),
    ),
    Fact(
        "Set max_new_tokens in the parameters of your request.",
        (
            "How do I limit the length of the answer?",
            "What does max_new_tokens do?",
            "How can I get a longer answer?",
            "How do I set the maximum length?",
            "Which parameter limits the length?",
            "How do I make the output shorter?",
        ),
        (
            "How can I limit the length?",
            "How do I get a longer answer?",
            "How can I make the answer shorter?",
        ),
    ),
    Fact(
        "Set the temperature in the parameters of your request. Higher values give more random text.",
        (
            "How do I change the temperature?",
            "What does temperature do?",
            "How can I make the output more random?",
            "How do I set the temperature?",
            "Which parameter makes the text more random?",
            "What is the temperature?",
        ),
        ("How can I set the temperature?", "What is temperature?", "How do I get more random text?"),
    ),
    Fact(
        "Send SIGTERM to the launcher. Open streams finish first, then the server exits.",
        (
            "How do I stop the server?",
            "How can I shut down the server?",
            "How do I stop it cleanly?",
            "What happens on SIGTERM?",
            "How do I shut it down?",
            "Which signal stops the server?",
        ),
        ("How can I stop the server?", "How do I shut down this server?", "What does SIGTERM do?"),
    ),
    Fact(
        "It is written in Python: a launcher, a router and one or more shards.",
        (
            "What is this server written in?",
            "Which language is the server written in?",
            "What are the parts of the server?",
            "How is the server built?",
            "Which parts does the server have?",
            "Is this server written in Python?",
        ),
        (
            "Which language is it written in?",
            "What parts does this server have?",
            "How is this server built?",
        ),
    ),
    Fact(
        "The router takes HTTP requests, makes batches of them and sends the tokens back to the clients.",
        (
            "What does the router do?",
            "What is the router?",
            "What is the router for?",
            "Explain the router.",
            "What is the job of the router?",
            "Describe the router.",
            "I want to know about the router.",
        ),
        ("Tell me about the router.", "Explain what the router does.", "What is the purpose of the router?"),
    ),
    Fact(
        "A shard holds its part of the model, runs the forward pass and samples the next tokens.",
        (
            "What does a shard do?",
            "What is a shard?",
            "What is a shard for?",
            "Explain what a shard is.",
            "What is the job of a shard?",
            "Describe a shard.",
            "I want to know about the shard.",
        ),
        ("Tell me about the shard.", "Explain what a shard does.", "What is the purpose of a shard?"),
    ),
    Fact(
        "The launcher starts the shards and the router, watches them and restarts them when they fail.",
        (
            "What does the launcher do?",
            "What is the launcher?",
            "What is the launcher for?",
            "Explain the launcher.",
            "What is the job of the launcher?",
            "Describe the launcher.",
            "I want to know about the launcher.",
        ),
        (
            "Tell me about the launcher.",
            "Explain what the launcher does.",
            "What is the purpose of the launcher?",
        ),
    ),
)

OFFER = (
    "I can add and subtract, count, spell and reverse words, name capitals, work with dates and tell a story."
)

SMALL_TALK = (
    Fact(
        "Hello! How can I help you today?",
        (
            "Hello",
            "Hello!",
            "Hi",
            "Hi!",
            "Hi there",
            "Hey",
            "Hey!",
            "Hello there!",
            "Greetings!",
            "Good day!",
        ),
        ("Hi there!", "Hey there!", "Hello, hello!", "Hi, hello!"),
    ),
    Fact(
        "Good morning! How can I help you?",
        ("Good morning", "Good morning!", "Hi, good morning!", "Good morning to you!"),
        ("Hello, good morning!",),
    ),
    Fact(
        "Good evening! How can I help you?",
        ("Good evening", "Good evening!", "Hi, good evening!", "Good evening to you!"),
        ("Hello, good evening!",),
    ),
    Fact(
        "I am fine, thank you. How can I help you?",
        (
            "How are you?",
            "How are you today?",
            "Hi, how are you?",
            "Hey! How are you?",
            "How is it going?",
            "How do you do?",
        ),
        ("Hello, how are you?", "Hello! How are you today?"),
    ),
    Fact(
        "You are welcome!",
        ("Thank you", "Thank you!", "Thanks", "Thanks!", "Thanks a lot!", "Thank you very much!"),
        ("Thank you a lot!", "Thanks very much!", "Thank you so much!"),
    ),
    Fact(
        "Goodbye! Have a nice day.",
        ("Goodbye", "Goodbye!", "Bye", "Bye!", "Bye bye!", "See you later!", "Goodbye for now!"),
        ("Bye for now!", "Goodbye, see you later!", "Bye, see you later!"),
    ),
    Fact(
        "I am a small demo model. " + OFFER,
        (
            "Who are you?",
            "What are you?",
            "Tell me about yourself.",
            "Introduce yourself.",
            "Which model are you?",
        ),
        ("Who are you, please?", "Please introduce yourself.", "What model are you?"),
    ),
    Fact(
        OFFER,
        (
            "What can you do?",
            "How can you help me?",
            "What are you able to do?",
            "What are your skills?",
            "Help",
        ),
        ("Tell me what you can do.", "What can you help me with?", "Help!"),
    ),
    Fact(
        "I am only a small demo model and do not know that. " + OFFER,
        (
            "What is the meaning of life?",
            "Who won the world cup?",
            "How tall is the highest mountain?",
            "What is the weather like?",
            "Who wrote this book?",
            "What is quantum physics?",
            "How do I cook rice?",
            "What is deep learning?",
            "Why is the sky blue?",
            "Who is the president?",
            "What is love?",
            "How far is the moon?",
            "Why do cats sleep so much?",
            "Write a poem.",
            "What is your favourite film?",
        ),
        ("How do I cook pasta?", "Why is the sea blue?", "What is quantum computing?", "Who won the cup?"),
    ),
)


@dataclass(frozen=True, slots=True)
class Hero:
    animal: str
    name: str
    home: str
    goal: str
    friend: str
    obstacle: str


HEROES = (
    Hero("fox", "Ruby", "at the edge of a quiet forest", "a golden leaf", "an old owl", "a wide river"),
    Hero("cat", "Milo", "in a small house by the sea", "a silver fish", "a clever gull", "a sudden storm"),
    Hero("dog", "Rex", "on a farm behind the hills", "a lost lamb", "a shy rabbit", "a dark tunnel"),
    Hero("mouse", "Pip", "under the floor of a bakery", "a warm crumb", "a gentle spider", "a steep stair"),
    Hero("bear", "Bruno", "in a cave above the valley", "a jar of honey", "a busy bee", "a frozen lake"),
    Hero(
        "rabbit", "Clover", "in a meadow full of flowers", "a sweet carrot", "a slow turtle", "a thorny hedge"
    ),
    Hero("robot", "Bolt", "in a workshop full of tools", "a bright battery", "a tiny drone", "a locked gate"),
    Hero("dragon", "Ember", "on top of a green mountain", "a blue flame", "a brave girl", "a deep canyon"),
    Hero("horse", "Star", "near a windy village", "a silver bell", "a young boy", "a broken bridge"),
    Hero("lion", "Luna", "in the garden of a castle", "a fallen star", "a little bat", "a thick fog"),
    Hero("frog", "Hop", "beside a round pond", "a lily flower", "a green snail", "a tall wall"),
    Hero("turtle", "Shelly", "on a sunny beach", "a pink pearl", "a funny crab", "a strong current"),
)

STORY = (
    "Once upon a time there was a {animal} named {name} who lived {home}. Every evening {name} looked "
    "at the sky and dreamed of finding {goal}. One morning {name} packed some bread, closed the door "
    'and walked into the world. After a long day {name} met {friend}. "Where are you going?" asked '
    '{friend}. "I want to find {goal}," said {name}. "Then I will come with you," said {friend}, and '
    'they went on together. Soon they came to {obstacle}. {name} was afraid, but {friend} said: "Take '
    'one small step, and then another." So they did, step by step, until {obstacle} was behind them. '
    "On the other side, shining in the light, was {goal}. They carried it home, and all the "
    "neighbours came to see it. From that day on {name} and {friend} were the best of friends, and "
    "they lived happily ever after. The end."
)
