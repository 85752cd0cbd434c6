//! Archives and tables that want to harm: one line that names file and place, no crash, nothing read elsewhere.

use std::io::Write;
use std::path::{Path, PathBuf};

use lavender_wgpu::data::DataSet;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/reference/formats")
        .join(name)
}

/// One header block of a tar archive, its checksum right.
fn header(name: &[u8], size: u64, kind: u8) -> Vec<u8> {
    let mut block = vec![0; 512];
    block[..name.len()].copy_from_slice(name);
    block[100..108].copy_from_slice(b"0000644\0");
    block[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
    block[148..156].copy_from_slice(b"        ");
    block[156] = kind;
    block[157..160].copy_from_slice(b"/etc"[..3].try_into().unwrap());
    block[257..265].copy_from_slice(b"ustar\x0000");
    let sum: u32 = block.iter().map(|&b| u32::from(b)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

/// A header that claims the most bytes that its field can hold, in binary as the field allows.
fn endless(name: &[u8]) -> Vec<u8> {
    let mut block = header(name, 0, b'0');
    block[124..136].copy_from_slice(&[0x80, 0, 0, 0, 255, 255, 255, 255, 255, 255, 255, 255]);
    block[148..156].copy_from_slice(b"        ");
    let sum: u32 = block.iter().map(|&b| u32::from(b)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

fn member(name: &[u8], content: &[u8]) -> Vec<u8> {
    let mut bytes = header(name, content.len() as u64, b'0');
    bytes.extend(content);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn refused(name: &str, bytes: &[u8], wanted: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    let error = match DataSet::load(&path, None) {
        Ok(_) => panic!("{wanted:?}: was read"),
        Err(error) => error.to_string(),
    };
    for part in wanted.iter().chain(&[name]) {
        assert!(error.contains(part), "`{error}` lacks `{part}`");
    }
}

#[test]
fn tar_members_that_escape_or_lie_are_refused() {
    let end = [0; 1024];
    let png = std::fs::read(fixture("images/s0.png")).unwrap();
    let good = [member(b"a.png", &png), member(b"a.txt", b"a cat")].concat();
    let with = |more: Vec<u8>| [&good[..], &more, &end].concat();
    let cases: Vec<(Vec<u8>, &[&str])> = vec![
        (
            with(member(b"../../evil.png", &png)),
            &["member 2", "../../evil.png", "leads out"],
        ),
        (
            with(member(b"/etc/passwd.txt", b"x")),
            &["member 2", "leads out"],
        ),
        (
            with(header(b"link.png", 0, b'2')),
            &["member 2", "link.png", "is a link"],
        ),
        (with(header(b"hard.png", 0, b'1')), &["is a link"]),
        (with(header(b"null.png", 0, b'3')), &["special file"]),
        (
            with(header(b"b.png", 0o77777777777, b'0')),
            &["member 2", "8589934591 bytes", "cut off"],
        ),
        (with(endless(b"b.png")), &["not a whole tar"]),
        (with(endless(b"ignored.bin")), &["not a whole tar"]),
        (
            with(member(b"b\xff.png", &png)),
            &["not UTF-8", "other names"],
        ),
        (
            with(member(b"b.txt", b"\xff\xfe")),
            &["member 2", "b.txt", "UTF-8 text"],
        ),
        (
            with(member(b"b.txt", b"no image")),
            &["sample `b`", "has no image"],
        ),
        (
            with(member(b"b.png", &png)),
            &["sample `b`", "no text", ".txt"],
        ),
        (with(member(b"a.jpg", &png)), &["member 2", "a second jpg"]),
        (
            with([member(b"b.png", &png), member(b"b.json", b"{oops")].concat()),
            &["sample `b`", "JSON"],
        ),
        (
            with([member(b"b.png", &png), member(b"b.txt", b" \n")].concat()),
            &["sample `b`", "empty"],
        ),
        (good.clone(), &["cut off"]),
        (good[..good.len() - 600].to_vec(), &["cut off"]),
        (
            b"this is not a tar archive at all".repeat(40),
            &["not a whole tar"],
        ),
    ];
    for (bytes, wanted) in cases {
        refused("shard.tar", &bytes, wanted);
    }
    refused("shard.tar.gz", &good, &["compressed", "gunzip"]);
    // A text larger than any caption, in a sparse file of its size.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bomb.tar");
    let mut file = std::fs::File::create(&path).unwrap();
    file.write_all(&header(b"a.json", 17 << 20, b'0')).unwrap();
    file.set_len(18 << 20).unwrap();
    let error = DataSet::load(&path, None).unwrap_err().to_string();
    assert!(
        error.contains("a.json") && error.contains("at most"),
        "{error}"
    );
    // The good part alone is read, members that are no part of a sample are passed over.
    let path = dir.path().join("good.tar");
    let whole = with(
        [
            member(b"b.cls", b"3"),
            member(b"README", b"x"),
            header(b"dir/", 0, b'5'),
        ]
        .concat(),
    );
    std::fs::write(&path, whole).unwrap();
    assert_eq!(DataSet::load(&path, None).unwrap().samples.len(), 1);
}

#[test]
fn brace_patterns_are_ranges() {
    for (name, wanted) in [
        ("s-{000..}.tar", "range of numbers"),
        ("s-{3..1}.tar", "range of numbers"),
        ("s-{0..99999999999}.tar", "range of numbers"),
        ("s-{00..02}.tar", "s-00.tar"),
    ] {
        let error = DataSet::load(Path::new("/nowhere").join(name), None)
            .unwrap_err()
            .to_string();
        assert!(error.contains(wanted), "{error}");
    }
}

#[test]
fn cut_and_damaged_parquet_files_are_refused() {
    let whole = std::fs::read(fixture("caption.parquet")).unwrap();
    for length in [0, 3, 8, whole.len() / 2, whole.len() - 1] {
        refused(
            "data.parquet",
            &whole[..length],
            &["not a whole parquet file"],
        );
    }
    // Any damaged byte gives an error or other samples, never a crash.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data.parquet");
    for at in (0..whole.len()).step_by(97) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x5a;
        std::fs::write(&path, &bytes).unwrap();
        match DataSet::load(&path, None) {
            Ok(set) => set.samples.iter().for_each(|s| drop(s.image.open())),
            Err(error) => assert!(error.to_string().contains("data.parquet"), "{error}"),
        }
    }
}

#[test]
fn parquet_columns_that_make_no_sample_are_named() {
    let cases: [(&str, &[&str]); 6] = [
        (
            "bad_texts",
            &["columns id, image, score", "expected `image`", "`messages`"],
        ),
        (
            "bad_image",
            &["column `image`", "INT64", "`bytes` and `path`"],
        ),
        (
            "bad_caption",
            &["row 0", "field `caption`", "found 0", "a text"],
        ),
        ("bad_path", &["row 0", "../../etc/x.png", "inside"]),
        ("bad_two", &["row 0", "several images"]),
        (
            "bad_bomb",
            &["column `caption`", "unpack to 8000", "row groups"],
        ),
    ];
    for (name, wanted) in cases {
        let path = fixture(&format!("{name}.parquet"));
        let error = match DataSet::load(&path, None) {
            // What only the images' own column shows comes out when an image is read.
            Ok(set) => set.samples[0].image.open().unwrap_err().to_string(),
            Err(error) => error.to_string(),
        };
        for part in wanted.iter().chain(&[name]) {
            assert!(error.contains(part), "`{error}` lacks `{part}`");
        }
    }
}

#[test]
fn an_image_that_is_no_image_is_named_with_its_sample() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s.tar");
    let bytes = [
        member(b"a.png", b"no image"),
        member(b"a.txt", b"a cat"),
        vec![0; 1024],
    ]
    .concat();
    std::fs::write(&path, bytes).unwrap();
    let set = DataSet::load(&path, None).unwrap();
    let error = set.samples[0].image.open().unwrap_err().to_string();
    assert!(
        error.contains("s.tar/a.png") && error.contains("not a PNG"),
        "{error}"
    );
}

#[test]
fn folders_are_read_without_following_links_out() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("set");
    std::fs::create_dir_all(root.join("in/side")).unwrap();
    let png = std::fs::read(fixture("images/s0.png")).unwrap();
    std::fs::write(root.join("in/side/a.png"), &png).unwrap();
    std::fs::write(root.join("in/side/a.txt"), "a cat\n").unwrap();
    std::fs::write(root.join("notes.txt"), "not a sample").unwrap();
    #[cfg(unix)]
    std::os::unix::fs::symlink(&root, root.join("again")).unwrap();
    let set = DataSet::load(&root, None).unwrap();
    assert_eq!(set.samples.len(), 1);
    assert_eq!(
        (set.samples[0].id.as_str(), set.samples[0].answer().as_str()),
        ("in/side/a", "a cat")
    );
    std::fs::write(root.join("in/side/a.jpg"), &png).unwrap();
    let error = DataSet::load(&root, None).unwrap_err().to_string();
    assert!(error.contains("stands beside"), "{error}");
    std::fs::remove_file(root.join("in/side/a.jpg")).unwrap();
    std::fs::write(root.join("b.png"), &png).unwrap();
    let error = DataSet::load(&root, None).unwrap_err().to_string();
    assert!(error.contains("b.png") && error.contains(".txt"), "{error}");
    let error = DataSet::load(tempfile::tempdir().unwrap().path(), None)
        .unwrap_err()
        .to_string();
    assert!(error.contains("holds no samples"), "{error}");
}

#[test]
fn karpathy_file_names_stay_in_the_folder_of_images() {
    let text = |name: &str| {
        format!(
            "{{\"dataset\":\"x\",\"images\":[{{\"filename\":\"{name}\",\"split\":\"train\",\"sentences\":[{{\"raw\":\"a\"}}]}}]}}"
        )
    };
    for name in ["../x.png", "/etc/x.png", "a/../../x.png"] {
        refused(
            "k.json",
            text(name).as_bytes(),
            &["images[0]", name, "inside"],
        );
    }
}
