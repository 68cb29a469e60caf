"""The tools that the pocket model is taught to call: names, arguments, questions, answers.

A tool is one ``Tool``. Its arguments map to value kinds of ``values.py``. ``requests`` follow
"please", ``questions`` stand alone; both hold the arguments in braces. ``result`` maps fields of
the answer to value kinds; ``answer`` is the final sentence over arguments and result.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tool:
    """One callable tool and the ways people ask for it."""

    name: str
    description: str
    arguments: dict[str, str]
    requests: tuple[str, ...]
    questions: tuple[str, ...]
    result: dict[str, str]
    answer: str


def _tool(
    name: str,
    description: str,
    arguments: dict[str, str],
    requests: str,
    questions: str,
    result: dict[str, str],
    answer: str,
) -> Tool:
    split = [tuple(t.strip() for t in s.split("|") if t.strip()) for s in (requests, questions)]
    return Tool(name, description, arguments, split[0], split[1], result, answer)


TOOLS: tuple[Tool, ...] = (
    _tool(
        "get_weather",
        "Current weather of a city",
        {"city": "city"},
        "tell me the weather in {city}|check the weather for {city}|look up the weather in {city}",
        "What is the weather like in {city}?|How is the weather in {city} now?|"
        "Is it raining in {city}?",
        {"temperature": "celsius", "sky": "sky"},
        "It is {temperature} degrees and {sky} in {city}.",
    ),
    _tool(
        "get_forecast",
        "Weather forecast for some days",
        {"city": "city", "days": "small_int"},
        "give me the forecast for {city} for {days} days|"
        "show the next {days} days of weather in {city}",
        "What will the weather be in {city} over {days} days?|"
        "How will the next {days} days be in {city}?",
        {"summary": "sky"},
        "The next {days} days in {city} will be {summary}.",
    ),
    _tool(
        "get_time",
        "Current time in a city",
        {"city": "city"},
        "tell me the time in {city}|look up the local time in {city}|check the clock in {city}",
        "What time is it in {city}?|What is the local time in {city}?|How late is it in {city}?",
        {"time": "time"},
        "It is {time} in {city}.",
    ),
    _tool(
        "set_alarm",
        "Set an alarm",
        {"time": "time"},
        "set an alarm for {time}|wake me at {time}|make an alarm at {time}|put the alarm on {time}",
        "Will you wake me up at {time}?|I have to get up at {time}, can you set the alarm?",
        {"ok": "ok"},
        "Your alarm is set for {time}.",
    ),
    _tool(
        "set_timer",
        "Start a timer",
        {"minutes": "int"},
        "set a timer for {minutes} minutes|start a timer of {minutes} minutes|"
        "count down {minutes} minutes",
        "Will you remind me in {minutes} minutes?|Can I have a timer for {minutes} minutes?",
        {"ok": "ok"},
        "The timer is running for {minutes} minutes.",
    ),
    _tool(
        "add_event",
        "Add an event to the calendar",
        {"title": "title", "date": "date"},
        "add {title} to my calendar on {date}|put {title} on {date}|schedule {title} for {date}",
        "I have {title} on {date}, can you note it?|Will you book {title} on {date}?",
        {"ok": "ok"},
        "I added {title} on {date}.",
    ),
    _tool(
        "list_events",
        "List the events of a day",
        {"date": "date"},
        "show my calendar for {date}|list my events on {date}|read me my plans for {date}",
        "What do I have on {date}?|Am I free on {date}?|What is planned for {date}?",
        {"event": "title"},
        "On {date} you have {event}.",
    ),
    _tool(
        "send_email",
        "Send an email",
        {"to": "email", "subject": "title"},
        "email {to} about {subject}|send a mail to {to} with the subject {subject}|"
        "write to {to} about {subject}",
        "Can you let {to} know about {subject} by mail?|Will you mail {to} on {subject}?",
        {"ok": "ok"},
        "I sent the mail about {subject} to {to}.",
    ),
    _tool(
        "send_message",
        "Send a text message",
        {"name": "person", "text": "phrase"},
        "text {name} that {text}|send a message to {name}: {text}|tell {name} this: {text}",
        "Will you write {name} the words {text}?|Can {name} get this message: {text}?",
        {"ok": "ok"},
        "I told {name}: {text}.",
    ),
    _tool(
        "call_phone",
        "Call a phone number",
        {"number": "phone"},
        "call {number}|dial {number}|ring the number {number}|phone {number} now",
        "Can you connect me with {number}?|Will you put me through to {number}?",
        {"status": "call_status"},
        "The call to {number} is {status}.",
    ),
    _tool(
        "find_contact",
        "Find a person in the address book",
        {"name": "person"},
        "find the number of {name}|look up {name} in my contacts|search my contacts for {name}",
        "What is the phone number of {name}?|Do I have the number of {name}?|"
        "How can I reach {name}?",
        {"number": "phone"},
        "The number of {name} is {number}.",
    ),
    _tool(
        "search_web",
        "Search the web",
        {"query": "phrase"},
        "search the web for {query}|look online for {query}|find pages about {query}",
        "What does the web say about {query}?|Can you google {query}?|"
        "Is there anything online on {query}?",
        {"title": "title"},
        "The first result for {query} is {title}.",
    ),
    _tool(
        "translate",
        "Translate a text",
        {"text": "phrase", "language": "language"},
        "translate {text} into {language}|put {text} into {language}|turn {text} into {language}",
        "How do you say {text} in {language}?|What is {text} in {language}?",
        {"translation": "strange"},
        "In {language} that is {translation}.",
    ),
    _tool(
        "convert_currency",
        "Convert money",
        {"amount": "amount", "source": "currency", "target": "currency"},
        "convert {amount} {source} to {target}|change {amount} {source} into {target}",
        "How much is {amount} {source} in {target}?|What are {amount} {source} worth in {target}?",
        {"value": "amount"},
        "{amount} {source} are {value} {target}.",
    ),
    _tool(
        "get_stock_price",
        "Price of a share",
        {"symbol": "ticker"},
        "get the share price of {symbol}|check the stock {symbol}|"
        "look up the price of {symbol} shares",
        "What does {symbol} trade at?|How is {symbol} doing on the market?|"
        "What is {symbol} stock worth?",
        {"price": "amount"},
        "{symbol} trades at {price} dollars.",
    ),
    _tool(
        "add",
        "Add two numbers",
        {"a": "int", "b": "int"},
        "add {a} and {b}|sum {a} and {b}|compute {a} plus {b}",
        "What is {a} plus {b}?|How much is {a} and {b} together?|What do {a} and {b} make?",
        {"sum": "int"},
        "The sum is {sum}.",
    ),
    _tool(
        "multiply",
        "Multiply two numbers",
        {"a": "int", "b": "int"},
        "multiply {a} by {b}|compute {a} times {b}|work out the product of {a} and {b}",
        "What is {a} times {b}?|How much is {a} multiplied by {b}?|What do {a} boxes of {b} make?",
        {"product": "int"},
        "The product is {product}.",
    ),
    _tool(
        "book_flight",
        "Book a flight",
        {"origin": "city", "destination": "city", "date": "date"},
        "book a flight from {origin} to {destination} on {date}|"
        "fly me from {origin} to {destination} on {date}",
        "Is there a flight from {origin} to {destination} on {date}?|"
        "Can I fly from {origin} to {destination} on {date}?",
        {"code": "code"},
        "Your flight from {origin} to {destination} is booked under {code}.",
    ),
    _tool(
        "book_hotel",
        "Book a hotel",
        {"city": "city", "nights": "small_int"},
        "book a hotel in {city} for {nights} nights|reserve {nights} nights in {city}|"
        "find me a room in {city} for {nights} nights",
        "Can I stay in {city} for {nights} nights?|Is there a room in {city} for {nights} nights?",
        {"hotel": "company"},
        "I booked {nights} nights at {hotel} in {city}.",
    ),
    _tool(
        "book_table",
        "Reserve a restaurant table",
        {"restaurant": "company", "people": "small_int", "time": "time"},
        "book a table at {restaurant} for {people} at {time}|"
        "reserve for {people} people at {restaurant} at {time}",
        "Can {people} of us eat at {restaurant} at {time}?|"
        "Is there a table at {restaurant} at {time} for {people}?",
        {"ok": "ok"},
        "Your table for {people} at {restaurant} is booked for {time}.",
    ),
    _tool(
        "get_directions",
        "Find the way between two places",
        {"start": "street", "end": "street"},
        "show the way from {start} to {end}|get directions from {start} to {end}|"
        "guide me from {start} to {end}",
        "How do I get from {start} to {end}?|What is the best way from {start} to {end}?",
        {"minutes": "int"},
        "From {start} to {end} it takes {minutes} minutes.",
    ),
    _tool(
        "order_taxi",
        "Order a taxi",
        {"address": "street", "time": "time"},
        "order a taxi to {address} at {time}|send a cab to {address} at {time}|"
        "get me a taxi at {address} for {time}",
        "Can a taxi be at {address} at {time}?|Will a cab come to {address} at {time}?",
        {"car": "code"},
        "Taxi {car} will be at {address} at {time}.",
    ),
    _tool(
        "play_song",
        "Play a song",
        {"title": "title"},
        "play {title}|put on {title}|play the song {title}|start the song {title}",
        "Can I hear {title}?|Will you play {title} for me?",
        {"artist": "person"},
        "Now playing {title} by {artist}.",
    ),
    _tool(
        "set_volume",
        "Set the volume in percent",
        {"level": "percent"},
        "set the volume to {level}|turn the sound to {level} percent|make the volume {level}",
        "Can the volume be {level} percent?|Will you put the sound at {level}?",
        {"ok": "ok"},
        "The volume is now {level}.",
    ),
    _tool(
        "set_light",
        "Set the light of a room",
        {"room": "room", "color": "color"},
        "make the light in the {room} {color}|turn the {room} light {color}|"
        "set the {room} to {color} light",
        "Can the {room} have {color} light?|Will you light the {room} in {color}?",
        {"ok": "ok"},
        "The light in the {room} is {color} now.",
    ),
    _tool(
        "add_to_list",
        "Add an item to the shopping list",
        {"item": "thing", "count": "small_int"},
        "add {count} {item} to my shopping list|put {count} {item} on the list|"
        "note {count} {item} for shopping",
        "Can you put down {count} {item} to buy?|We need {count} {item}, will you note it?",
        {"ok": "ok"},
        "I added {count} {item} to your list.",
    ),
    _tool(
        "track_package",
        "Track a package",
        {"number": "code"},
        "track the package {number}|follow my parcel {number}|check the delivery {number}",
        "Where is my package {number}?|When will {number} arrive?|Has parcel {number} been sent?",
        {"status": "parcel_status", "city": "city"},
        "Package {number} is {status} in {city}.",
    ),
    _tool(
        "read_file",
        "Read a file",
        {"path": "path"},
        "read the file {path}|open {path}|show me what is in {path}|print {path}",
        "What does {path} say?|What is written in {path}?",
        {"text": "phrase"},
        "The file {path} says: {text}.",
    ),
    _tool(
        "delete_file",
        "Delete a file",
        {"path": "path"},
        "delete {path}|remove the file {path}|erase {path} from the disk",
        "Can you get rid of {path}?|Will you throw {path} away?|Could {path} be deleted?",
        {"ok": "ok"},
        "I deleted {path}.",
    ),
    _tool(
        "create_note",
        "Save a note",
        {"title": "title", "text": "phrase"},
        "save a note called {title} saying {text}|make a note {title} with the text {text}",
        "Can you note {text} under {title}?|Will you keep {text} in a note named {title}?",
        {"id": "int"},
        "I saved the note {title} as number {id}.",
    ),
    _tool(
        "find_recipe",
        "Find a recipe with an ingredient",
        {"ingredient": "thing"},
        "find a recipe with {ingredient}|give me a recipe for {ingredient}|"
        "search for a dish with {ingredient}",
        "What can I cook with {ingredient}?|Which dish uses {ingredient}?|"
        "How can I cook {ingredient}?",
        {"dish": "title"},
        "With {ingredient} you could cook {dish}.",
    ),
    _tool(
        "get_user",
        "Look up a user by number",
        {"user_id": "int"},
        "look up user {user_id}|show me the user number {user_id}|"
        "get the account of user {user_id}",
        "Who is user {user_id}?|Which person has the number {user_id}?|"
        "What is the name of user {user_id}?",
        {"name": "person"},
        "User {user_id} is {name}.",
    ),
)
