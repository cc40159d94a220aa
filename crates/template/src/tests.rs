//! Templates in the styles that published models use, checked against what Jinja2 makes of them.

use super::*;

const SYSTEM: Role = Role::System;
const USER: Role = Role::User;
const ASSISTANT: Role = Role::Assistant;

fn now() -> Zoned {
    "2026-07-26T10:00:00+00:00[UTC]".parse().unwrap()
}

fn render(source: &str, messages: &[(Role, &str)]) -> Result<String, TemplateError> {
    let messages: Vec<_> =
        messages.iter().map(|&(role, content)| Message { role, content: content.to_owned(), name: None }).collect();
    ChatTemplate::new(Some(source), "<s>", "</s>")?.render(&messages, &now())
}

#[track_caller]
fn check(source: &str, messages: &[(Role, &str)], expected: &str) {
    assert_eq!(render(source, messages).as_deref(), Ok(expected));
}

#[track_caller]
fn check_refused(source: &str, messages: &[(Role, &str)], expected: &str) {
    assert_eq!(render(source, messages), Err(TemplateError::Refused(expected.to_owned())));
}

#[test]
fn a_model_without_template_gets_chatml() {
    let messages = [Message { role: USER, content: "1+1?".to_owned(), name: None }];
    let text = ChatTemplate::new(None, "", "").unwrap().render(&messages, &now()).unwrap();
    assert_eq!(text, "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n");
}

#[test]
fn the_embedded_models_template_keeps_its_line_breaks() {
    let source = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}\
        {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
    check(
        source,
        &[(USER, "a"), (ASSISTANT, "b"), (USER, "c & <d>")],
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc & <d><|im_end|>\n\
         <|im_start|>assistant\n",
    );
}

#[test]
fn headers_with_a_date() {
    let source = r#"{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "1 Jan 2000" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}{{- "Environment: tools\n" }}{%- endif %}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"#;
    check(
        source,
        &[(SYSTEM, " Be brief. "), (USER, " hi\n")],
        "<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2026\n\nBe brief.<|eot_id|>\
         <|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    );
}

#[test]
fn a_template_may_refuse_a_role() {
    let source = "{{ bos_token }}{% if messages[0]['role'] == 'system' %}\
        {{ raise_exception('System role not supported') }}{% endif %}\
        {% for message in messages %}\
        {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
        {% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}\
        {% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}\
        {% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}";
    check(
        source,
        &[(USER, "a"), (ASSISTANT, "b "), (USER, "c")],
        "<s><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n<start_of_turn>user\n\
         c<end_of_turn>\n<start_of_turn>model\n",
    );
    check_refused(source, &[(SYSTEM, "a"), (USER, "b")], "System role not supported");
    check_refused(
        source,
        &[(USER, "a"), (USER, "b")],
        "Conversation roles must alternate user/assistant/user/assistant/...",
    );
}

#[test]
fn a_default_system_message_and_reasoning_cut_off() {
    let source = r#"{%- if tools %}
    {{- '<tools>' }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(
        message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}{{- tool_call.arguments | tojson }}{%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"#;
    check(
        source,
        &[(SYSTEM, "S"), (USER, "a"), (ASSISTANT, "<think>\nhm\n</think>\n\nb"), (USER, "c")],
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n\
         <|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n",
    );
}

#[test]
fn instructions_in_brackets() {
    let source = r#"{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("roles must alternate") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"].strip() + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
"#;
    check(
        source,
        &[(SYSTEM, "S"), (USER, " a "), (ASSISTANT, "b"), (USER, "c")],
        "<s>[INST] a[/INST] b</s>[INST] S\n\nc[/INST]",
    );
    check_refused(source, &[(ASSISTANT, "b")], "roles must alternate");
}

#[test]
fn blocks_take_their_lines_along() {
    check("{% for m in messages %}\n  {% if true %}\nx\n  {% endif %}\n{% endfor %}\ny\n", &[(USER, "a")], "x\ny");
}

#[test]
fn json_is_written_as_python_does() {
    check(r#"{{ {"a": [1, "<é>"], "b": none} | tojson }}"#, &[], r#"{"a": [1, "<é>"], "b": null}"#);
    check(r#"{{ {"a": 1} | tojson(indent=4) }}"#, &[], "{\n    \"a\": 1\n}");
    check("{{ messages | tojson }}", &[(USER, "a")], r#"[{"role": "user", "content": "a"}]"#);
}

#[test]
fn macros_and_training_marks_work() {
    check(
        "{% macro turn(m) %}[{{ m.role|upper }}:{{ m.content.split(' ')[0] }}]{% endmacro %}\
         {% for m in messages %}{%- generation -%}{{ turn(m) }}{% endgeneration %}{% endfor %}",
        &[(USER, "a b"), (ASSISTANT, "c d")],
        "[USER:a][ASSISTANT:c]",
    );
    check("{% set generation = 1 %}{{ generation }}", &[], "1");
}

#[test]
fn contents_are_never_a_template() {
    check("{{ messages[0].content }}", &[(USER, "{{ bos_token }}{% raw %}")], "{{ bos_token }}{% raw %}");
}

#[test]
fn limits_hold() {
    let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{{ '' }}{% endfor %}{% endfor %}";
    assert_eq!(render(endless, &[]), Err(TemplateError::TooMuchWork));
    let long = "{% for a in range(9999) %}{{ messages[0].content }}{% endfor %}";
    assert_eq!(render(long, &[(USER, &"x".repeat(10_000))]), Err(TemplateError::TooLong));
    assert_eq!(
        render(&" ".repeat(MAX_SOURCE_BYTES + 1), &[]),
        Err(TemplateError::SourceTooLong { bytes: MAX_SOURCE_BYTES + 1 })
    );
    assert!(matches!(render("{% for %}", &[]), Err(TemplateError::Syntax(_))));
    assert!(matches!(render("{{ messages[0].content.nothing() }}", &[(USER, "a")]), Err(TemplateError::Render(_))));
    assert!(matches!(render("{{ strftime_now('%Q%!') }}", &[]), Err(TemplateError::Render(_))));
}

#[test]
fn a_start_token_is_seen_once() {
    let template = ChatTemplate::new(Some("{{ bos_token }}x"), "<s>", "").unwrap();
    assert!(template.starts_itself("<s>x"));
    assert!(!template.starts_itself("x<s>"));
    assert!(!ChatTemplate::new(None, "", "").unwrap().starts_itself("x"));
}

/// Fills a source to its limit with one thing.
fn filled(before: &str, unit: &str, after: &str) -> String {
    let room = MAX_SOURCE_BYTES - before.len() - after.len();
    format!("{before}{}{after}", unit.repeat(room / unit.len()))
}

/// The same, in tags of the longest length.
fn in_tags(before: &str, unit: &str, n_tokens: usize, after: &str) -> String {
    let tag = format!("{before}{}{after}", unit.repeat((source::MAX_TAG_TOKENS - 8) / n_tokens));
    tag.repeat(MAX_SOURCE_BYTES / tag.len())
}

/// Fails if the source takes longer than anybody would wait, or ends the process.
#[track_caller]
fn ends_soon(source: &str) -> Result<String, TemplateError> {
    let start = std::time::Instant::now();
    let rendered = render(source, &[(USER, &"x".repeat(10_000))]);
    // A second on an idle machine.
    let (taken, limit) = (start.elapsed(), std::time::Duration::from_secs(10));
    assert!(taken < limit, "{taken:?}: {}", source.chars().take(200).collect::<String>());
    rendered
}

#[test]
fn no_source_is_too_deep_for_the_stack() {
    for (before, unit, after) in [
        ("{{ ", "(", ""),
        ("{{ ", "[", ""),
        ("{% if x %}", "{%elif x%}", "{% endif %}"),
        ("", "{%if x%}", ""),
        ("", "{%for x in x%}", ""),
        ("", "{%set x%}", ""),
        ("", "{%macro x()%}", ""),
        ("", "{{x}}", ""),
    ] {
        drop(ends_soon(&filled(before, unit, after)));
    }
    assert!(matches!(ends_soon(&filled("{{ ", "-", "1 }}")), Err(TemplateError::Syntax(_))));
}

#[test]
fn long_expressions_compile_soon() {
    for (before, unit, n_tokens, after) in [
        ("{{ ", "-", 1, "1 }}"),
        ("{{ ", "not ", 1, "1 }}"),
        ("{{ x", ".a", 2, " }}"),
        ("{{ x", "[0]", 3, " }}"),
        ("{{ x", "()", 2, " }}"),
        ("{{ x", "|e", 2, " }}"),
        ("{{ x", " is x", 2, " }}"),
        ("{{ 1", "+1", 2, " }}"),
        ("{{ x", "+x", 2, " }}"),
        ("{{ 1", "~1", 2, " }}"),
        ("{{ 1", "*1", 2, " }}"),
        ("{{ 1", " and 1", 2, " }}"),
        ("{{ 1", " or 1", 2, " }}"),
        ("{{ x", " in 1", 2, " }}"),
        ("{{ x", "==1", 2, " }}"),
        ("{{ ", "1**", 2, "1 }}"),
        ("{{ ", "1 if 1 else ", 4, "1 }}"),
        ("{{ ", "x if x ", 3, "}}"),
        ("{% set x", ".a", 2, " = 1 %}"),
        ("{% filter e", "|e", 2, " %}{% endfilter %}"),
        ("{{ {1:1", ",1:1", 4, "} }}"),
        ("{{ '", &"x".repeat(50), 500, "'+'' ~'y' }}"),
    ] {
        drop(ends_soon(&in_tags(before, unit, n_tokens, after)));
    }
    let text = "x".repeat(MAX_SOURCE_BYTES / 2);
    drop(ends_soon(&format!("{{{{ '{text}'{} }}}}", "~'y'".repeat(500))));
    drop(ends_soon(&format!("{{{{ '{text}'{} }}}}", "+'y'".repeat(500))));
    drop(ends_soon(&format!("{{{{ '{text}'{} }}}}", "*2".repeat(500))));
    drop(ends_soon(&"{{ 'x'*99999999 }}".repeat(3000)));
    drop(ends_soon(&"{% set x = 'x' * (9999 * 9999) %}".repeat(1900)));
}

#[test]
fn what_grows_or_nests_without_end_is_refused() {
    for source in [
        "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}",
        "{% set ns = namespace() %}{% set ns.x = [ns] %}{{ ns | string }}",
        "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns | tojson }}",
        "{% set ns = namespace() %}{% set ns.x = ns %}{{ [ns] | join }}",
        "{% set ns = namespace() %}{% set ns.x = {'a': {'b': ns}} %}{{ ns ~ '' }}",
        "{% set ns = namespace() %}{% set ms = namespace(x=ns) %}{% set ns.x = ms %}{{ ns == ms }}",
        "{% set ns = namespace() %}{% for n in [ns, 1] %}{% set ns.x = loop %}{% endfor %}{{ {ns: 1} }}",
        "{% set ns = namespace(x=0) %}{% for i in range(1000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=0) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x='xx') %}{% for i in range(90) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='xx') %}{% for i in range(90) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='xx') %}{% for i in range(90) %}{% set ns.x = ns.x * 2 %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(90) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(90) %}{% set ns.x = ns.x * 2 %}{% endfor %}",
        "{% set ns = namespace(x='xx') %}{% for i in range(90) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}\
         {% set ns.x = y %}{% endfor %}",
        "{% macro m(x, n) %}{{ x }}{{ x }}{% endmacro %}{% set ns = namespace(x='xx') %}\
         {% for i in range(90) %}{% set ns.x = m(ns.x) %}{% endfor %}",
        "{% set x %}{% for i in range(99999) %}{% for j in range(99999) %}01234567{% endfor %}{% endfor %}{% endset %}",
        "{{ 'x' | indent(9999999999, true) }}",
        "{{ 'x' | indent(width=9999999999) }}",
        "{{ ('x' * 10000) | replace('', 'y' * 10000) }}",
        "{{ ('x' * 10000).replace('x', 'y' * 10000) }}",
        "{{ (['x' * 10000] * 10000) | join }}",
        "{{ ('x' * 10000).join(['y'] * 10000) }}",
        "{{ (['x' * 10000] * 10000) | tojson }}",
        "{{ (['x' * 10000] * 10000) | map('replace', 'x', 'xxxxxxxxxxxxxxxx') | list }}",
        "{{ '{:999999999999}'.format(1) }}",
        "{{ ('{0}' * 10000).format('x' * 10000) }}",
        "{{ ('x' * 1000000).strip('y' * 1000000) }}",
        "{{ ('x' * 1000000) | trim('y' * 1000000) }}",
        "{{ strftime_now('%Y' * 1000) }}",
        "{{ range(-9999999999999999999, 9999999999999999999, 3) }}",
        "{{ range(9223372036854775807, -9223372036854775807, -2) }}",
        "{{ [1] | batch(999999999999, 0) }}",
        "{{ [1] | slice(999999999999) }}",
        "{{ [1] | sum }}",
        "{{ debug() }}",
        "{% for a in [1] %}{{ loop.cycle() }}{% endfor %}",
        "{{ dict(**{}) }}",
        "{{ dict(*[]) }}",
        "{% include 'chat_template' %}",
        "{% extends 'chat_template' %}",
        "{% import 'chat_template' as x %}",
        "{% block a %}{% endblock %}",
        "{% autoescape true %}{% endautoescape %}",
        "{{ super() }}",
    ] {
        let rendered = ends_soon(source);
        assert!(
            matches!(rendered, Err(TemplateError::Render(_) | TemplateError::Syntax(_) | TemplateError::TooMuchWork)),
            "{source}: {rendered:?}"
        );
    }
}

#[test]
fn work_is_bounded_however_it_is_done() {
    let long = "{% set x = messages[0].content * 100 %}{% set y = messages[0].content * 100 %}";
    let list = "{% set l = [x] * 200 %}{% set n = range(90000) | list %}";
    for body in [
        "{% if x == y %}{% endif %}",
        "{% if x != y %}{% endif %}",
        "{% if x < y < x %}{% endif %}",
        "{% if 'y' in x %}{% endif %}",
        "{% if 'y' not in x %}{% endif %}",
        "{% if 'y' in n %}{% endif %}",
        "{% if n == n %}{% endif %}",
        "{{ x[5:6] }}",
        "{{ x[999] }}",
        "{% set z = x ~ i %}",
        "{% set z = n[1:] %}",
        "{% set z = n + n %}",
        "{% set z = x | upper %}",
        "{% set z = x | length %}",
        "{% set z = x | trim %}",
        "{% set z = x | list %}",
        "{% set z = n | reverse %}",
        "{% set z = n | last %}",
        "{% set z = n | map('string') | list %}",
        "{% set z = l | sort %}",
        "{% set z = l | unique | list %}",
        "{% set z = l | min %}",
        "{% set z = l | join %}",
        "{% set z = l | tojson %}",
        "{% set z = l | map('upper') | list %}",
        "{% set z = l | select('eq', y) | list %}",
        "{% set z = n | map(attribute='a.b.c.d.e.f.g') | list %}",
        "{% set z = x.upper() %}",
        "{% set z = x.split('x') %}",
        "{% set z = x.startswith('y') %}",
        "{% set z = x.find('y') %}",
        "{% set z = n.count(1) %}",
        "{% set z = '{}'.format(x) %}",
        "{% set z = {x: 1} %}",
        "{% for a in x %}{% break %}{% endfor %}",
        "{% for a in n %}{% break %}{% endfor %}",
        "{% for a in dict(n | map('items')) %}{% break %}{% endfor %}",
        "{% set a, b = n %}",
        "{% set z = x is startingwith 'y' %}",
        "{% set z = x is lower %}",
        "{% set z = x | int(1) %}",
        "{% set z = range(90000) | list %}",
        "{% set z = strftime_now('%Y') %}",
        "{% set z = x | e %}",
        "{{ raise_exception(x) }}",
    ] {
        let twice = "{% for i in range(99999) %}{% for j in range(99999) %}";
        let source = format!("{long}{list}{twice}{body}{{% endfor %}}{{% endfor %}}");
        let rendered = ends_soon(&source);
        assert!(rendered.is_err(), "{body}");
    }
}

#[test]
fn checks_change_nothing() {
    for (source, expected) in [
        ("{% set a = [1] + [2] %}{{ a }}{{ a[1:] }}{{ a[-1] }}{{ a * 2 }}", "[1, 2][2]2[1, 2, 1, 2]"),
        ("{% set a = [1] + [2] %}{{ a is sequence }}{{ (a + a) is sequence }}", "TrueTrue"),
        ("{% set x, y = (1, 2) %}{{ (x, y) }}{{ (1, 2)[1:] }}{{ (1,) + (2,) }}", "(1, 2)(2,)(1, 2)"),
        ("{{ 2 * 3 ** 2 }}{{ 1 < 2 < 3 }}{{ 1 in [1] in [[1]] }}{{ 2 not in [1] }}", "18TrueTrueTrue"),
        ("{{ 'a' 'b' }}{{ 2*'ab' }}{{ 'abc'[::-1] }}{{ 'abc'[1] }}{{ 7 % 4 - 1 // 1 }}", "abababcbab2"),
        ("{{ nothing == 1 }}{{ nothing ~ 'a' }}{{ {'a': 1}.b == none }}{{ nothing[1:] }}", "FalseaFalse[]"),
        ("{{ [][::-1] }}{{ ''[::-1] }}{{ [1, 2, 3][5:0:-2] }}{{ 'abc'[-9:9] }}{{ 'abc'[:-1:2] }}", "[][3]abca"),
        ("{{ [1, 2, 3][-2:] }}{{ [1, 2, 3][:-9223372036854775808:-9223372036854775808] }}", "[2, 3][3]"),
        ("{{ nothing or 'x' }}{{ {'a': {'b': 2}}['a']['b'] }}{{ {1 + 1: 2}[2] }}", "x22"),
        ("{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}{{ v }}{% else %}-{% endfor %}", "a1b2"),
        ("{% for k in {'c': 1} if k != 'd' %}{{ k }}{{ loop.last }}{% endfor %}", "cTrue"),
        (
            "{% for x in [1, [2, [3]]] recursive %}{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}{% endif %}\
             {% endfor %}",
            "1(2(3))",
        ),
        (
            "{% macro m(a, b=2) %}{{ a + b }}{{ caller() if caller }}{% endmacro %}{{ m(1) }}\
             {% call m(b=1, a='x' | length) %}!{% endcall %}",
            "32!",
        ),
        ("{% set ns = namespace(n=0) %}{% for i in range(3) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}", "3"),
        ("{% set x %}a{% filter upper %}b{% endfilter %}{% endset %}{{ x }}{{ loop is defined or 'no' }}", "aBno"),
        ("{{ [3, 1, 2] | sort | reverse | list }}{{ 'b-a' | split('-') | last }}{{ x | default('d') }}", "[3, 2, 1]ad"),
        ("{{ [{'a': 1}, {'a': 2}] | selectattr('a', 'gt', 1) | map(attribute='a') | join('|') }}", "2"),
        ("{% with a = 1 %}{{ a if a is odd else 'even' }}{% endwith %}{% do range(1) %}", "1"),
        ("{{ '{} {x}'.format(1, x=[2]) }}{{ ' a '.strip() }}{{ 'aXa'.lower().count('a') }}", "1 [2]a2"),
    ] {
        check(source, &[], expected);
    }
}

#[test]
fn an_error_stays_short() {
    let Err(TemplateError::Refused(text)) = render("{{ raise_exception('é' * 9999) }}", &[]) else { panic!() };
    assert!(text.len() <= MAX_ERROR_BYTES + 3 && text.ends_with("é..."), "{text}");
}

#[test]
fn many_messages_are_no_trouble() {
    let source = "{% set ns = namespace(last=0) %}{% for m in messages[::-1] %}{% if m.role == 'user' %}\
        {% set ns.last = messages | length - 1 - loop.index0 %}{% break %}{% endif %}{% endfor %}\
        {% for m in messages %}{% set content = m.content | trim %}{% if '</think>' in content %}\
        {% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}\
        {{ '<|im_start|>' + m.role + '\n' + content ~ '<|im_end|>\n' }}{% endfor %}";
    let text = "word ".repeat(200);
    let messages: Vec<_> = (0..4000).map(|i| (if i % 2 == 0 { USER } else { ASSISTANT }, text.as_str())).collect();
    assert_eq!(render(source, &messages).map(|text| text.len() > 4_000_000), Ok(true));
}

#[test]
fn bounded_filters_work_as_before() {
    check("{{ ['a', 1] | join(', ') }}{{ '-'.join(['b', 'c']) }}{{ 'd' | join }}", &[], "a, 1b-cd");
    check("{{ 'aab' | replace('a', 'x') }}{{ 'aab'.replace('a', 'y', 1) }}", &[], "xxbyab");
    check("{{ 'a\nb' | indent }}{{ 'a\nb' | indent(width=1, first=true) }}", &[], "a\n    b a\n b");
    check("{{ [1, {'a': none}] | string }}{{ '{:02}'.format(3) }}", &[], "[1, {'a': None}]03");
}
